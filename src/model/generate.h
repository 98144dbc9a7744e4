// Writing text with a model: prompts in, tokens out, for any number of sequences as one batch.
#pragma once

#include "model/model.h"
#include "model/sample.h"

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

enum class Finish : uint8_t { running, length, end_token, stop_string, cache_full, cancelled };

std::string_view name(Finish finish);

// One text in the making.
struct Generation {
  int sequence = 0;             // in the cache, which may hold the first of `tokens` already (a chat's history)
  std::vector<int32_t> tokens;  // the prompt; what is generated is appended, an end token included. The last one is not in the cache

  std::vector<Sampled> sampled;  // what was generated
  std::string text;              // its text, up to a stop string
  Finish finish = Finish::running;
};

struct GenerateOptions {
  int64_t max_tokens = 128;  // new ones, for each text
  SamplingOptions sampling;
  std::vector<int32_t> end_tokens;        // a text ends with any of these
  std::vector<std::string> stop_strings;  // and before any of these
  // Prompt tokens of a sequence in one step. Where chunks end depends on the sequence alone, so that its text does too.
  int64_t prefill_chunk = 0;  // 0: as many as suit the device (Device::step_tokens)
};

// What a caller may want to know on the way; each may be empty.
struct GenerateHooks {
  // The text that is complete with this token, or, without one, what is left. Needed for text and stop strings.
  std::function<std::string(size_t index, std::optional<int32_t> token)> spell;
  std::function<void(size_t index, std::string_view text)> on_text;  // text that will not be taken back
  std::function<void(size_t index)> on_finish;
  std::function<void(double fraction)> on_prefill;
  std::function<bool()> cancelled;  // asked before each layer of a step; a step that is given up leaves no trace
};

struct GenerateFigures {
  int64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  double decode_bytes = 0;  // weights and cache rows that the decode steps read

  void add(const GenerateFigures& other);
};

// Runs what the cache does not hold of each prompt, then writes tokens until all texts have ended. When the cache has no page left the
// texts that still run end with cache_full.
GenerateFigures generate(Model& model, LatentCache& cache, std::span<Generation> texts, const GenerateOptions& options,
                         const GenerateHooks& hooks = {});

// Finds stop strings in a text that arrives in pieces.
class StopScan {
 public:
  explicit StopScan(std::span<const std::string> stops) : stops_(stops) {}
  // Appends a piece to `text`; true if a stop string is there now, and the text is cut before it.
  bool append(std::string& text, std::string_view piece) const;
  // Bytes of the text that cannot become part of a stop string.
  size_t settled(std::string_view text) const;

 private:
  std::span<const std::string> stops_;
};

}  // namespace mla
