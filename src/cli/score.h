// How well models predict a text: perplexity of one, and the divergence of a second one from it.
#pragma once

#include "model/model.h"

#include <functional>
#include <span>

namespace mla {

// -log p(next) under one row of logits, in double: log Σ exp(x - max) + max - x[next].
double negative_log_likelihood(std::span<const float> logits, int32_t next);

struct Comparison {
  double nll_before = 0, nll_after = 0, kl = 0;  // means over the tokens scored; KL(before ‖ after), nats
  int64_t scored = 0;
};

// Both models over the same windows of a text; all tokens of a window but the first are scored. `kv_type` is that of both caches.
Comparison compare_models(Model& before, Model& after, std::span<const int32_t> tokens, int64_t window, DType kv_type,
                          const std::function<void(double)>& progress = {});

}  // namespace mla
