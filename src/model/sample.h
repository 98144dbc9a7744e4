// From logits to a token.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace mla {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy
  int top_k = 0;           // 0: off
  double top_p = 1, min_p = 0;
  double repetition_penalty = 1;  // over all tokens of the sequence so far
  std::vector<std::pair<int32_t, float>> logit_bias;
  uint64_t seed = 0;
  std::optional<int> logprobs;  // alternatives to report, 0 … 20; nothing: log-probabilities are not computed
};

struct Sampled {
  int32_t token;
  float logprob;                                        // of the token as the model gave it, before any of the options
  std::vector<std::pair<int32_t, float>> alternatives;  // the most likely, best first
};

// Order: logit bias, repetition penalty, temperature, top-k, top-p, min-p, draw. The draw is a function of (seed, position) alone, so
// that a text does not depend on the batch it was made in. `history` are the sequence's tokens. Equal logits: the lower id.
Sampled sample(std::span<const float> logits, std::span<const int32_t> history, const SamplingOptions& options, int64_t position);

// Whether nothing but the temperature bends the draw and no log-probabilities are asked for: what Device::choose can do.
bool is_plain(const SamplingOptions& options);

// Raises Error that names the option that makes no sense.
void check_sampling(const SamplingOptions& options, int64_t vocab_size);

}  // namespace mla
