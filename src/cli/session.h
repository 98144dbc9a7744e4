// A model opened for work: checkpoint, tokenizer, device and weights, and what every command needs of them.
#pragma once

#include "cli/dump.h"
#include "cli/options.h"
#include "io/checkpoint.h"
#include "text/chat.h"
#include "text/tokenizer.h"

#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <optional>

namespace mla {

// The tokenizer a checkpoint brings; nothing when it brings none.
std::optional<Tokenizer> open_tokenizer(const Checkpoint& checkpoint);

Tokenizer::GgufVocabulary gguf_vocabulary(const Checkpoint& checkpoint);  // as its metadata say

class Session {
 public:
  explicit Session(const ModelOptions& options);  // loads, with a progress bar
  ~Session();

  const Checkpoint& checkpoint() const { return checkpoint_; }
  Device& device() { return *device_; }
  // All tensors of the file, as it has them, and how long it took until the device had what the model wants.
  double loaded_bytes() const { return loaded_bytes_; }
  double loading_seconds() const { return loading_seconds_; }
  Model& model() { return *model_; }
  const Config& config() const { return model_->config(); }
  const Tokenizer* tokenizer() const { return tokenizer_ ? &*tokenizer_ : nullptr; }
  const Tokenizer& need_tokenizer(const char* instead) const;  // raises Error that says what to give instead

  // A cache for `tokens` tokens, or for --context if that is given; raises Error when the work needs more than that or than memory.
  LatentCache make_cache(int64_t tokens) const;

  ChatStyle chat_style(const std::string& name) const;  // by name, or as the file's template says
  std::vector<int32_t> end_tokens() const;              // of the model and its tokenizer

  void finish_dump();  // writes --dump's file

 private:
  ModelOptions options_;
  Checkpoint checkpoint_;
  std::optional<Tokenizer> tokenizer_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<DumpFile> dump_;
  double loaded_bytes_ = 0, loading_seconds_ = 0;
};

// What a run did, for the last line on stderr and for JSON.
struct RunFigures {
  GenerateFigures work;
  int64_t cache_bytes_per_token = 0;
  std::string kv_type;
  double read_gb_s = 0;  // probed after the run

  RunFigures(const GenerateFigures& figures, const LatentCache& cache, Device& device);
  double prefill_tok_s() const;
  double decode_tok_s() const;
  double share() const;  // of memory bandwidth, in decode
  void print() const;    // one line on stderr
  void add_to(nlohmann::ordered_json& json) const;
};

}  // namespace mla
