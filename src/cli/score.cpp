// Windows in chunks, so that two models' logits stay small.
#include "cli/score.h"

#include "core/check.h"
#include "core/threads.h"

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

double log_sum(std::span<const float> logits) {
  const float best = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(double(x) - best);
  return std::log(sum) + best;
}

// Both models' −log p(next) and their divergence Σ p (log p − log q), for which each exponential is taken once.
Comparison compare(std::span<const float> p, std::span<const float> q, int32_t next) {
  const float best = *std::max_element(p.begin(), p.end());
  double sum = 0, apart = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double e = std::exp(double(p[i]) - best);
    sum += e, apart += e * (double(p[i]) - double(q[i]));
  }
  const double p_log = std::log(sum) + best, q_log = log_sum(q);
  return {p_log - double(p[size_t(next)]), q_log - double(q[size_t(next)]), apart / sum - p_log + q_log, 1};
}

}  // namespace

double negative_log_likelihood(std::span<const float> logits, int32_t next) { return log_sum(logits) - double(logits[size_t(next)]); }

Comparison compare_models(Model& before, Model& after, std::span<const int32_t> tokens, int64_t window, DType kv_type,
                          const std::function<void(double)>& progress) {
  constexpr int64_t chunk = 128;
  CHECK(before.config().vocab_size == after.config().vocab_size, "{} and {} tokens", before.config().vocab_size, after.config().vocab_size);
  const auto vocab = size_t(before.config().vocab_size);
  LatentCache caches[] = {before.make_cache(window, kv_type), after.make_cache(window, kv_type)};
  const int64_t windows = int64_t(tokens.size()) / window;
  Comparison out;
  for (int64_t w = 0; w < windows; ++w) {
    const auto text = tokens.subspan(size_t(w * window), size_t(window));
    const int sequences[] = {caches[0].open(), caches[1].open()};
    for (int64_t at = 0; at < window; at += chunk) {
      if (progress) progress((double(w) + double(at) / double(window)) / double(windows));
      const int64_t n = std::min(chunk, window - at), scored = std::min(n, window - at - 1);
      const auto part = text.subspan(size_t(at), size_t(n));
      const Chunk chunks[] = {{sequences[0], part, Chunk::Logits::all}, {sequences[1], part, Chunk::Logits::all}};
      const Tensor a = before.to_host(before.forward({&chunks[0], 1}, caches[0]));
      const Tensor b = after.to_host(after.forward({&chunks[1], 1}, caches[1]));
      CHECK(a.data && b.data, "no room in the cache for a window of {}", window);
      std::vector<Comparison> each(static_cast<size_t>(scored));
      before.device().threads().parallel(scored, [&](int64_t i, int) {
        const std::span<const float> p(a.f32() + i * a.stride[0], vocab), q(b.f32() + i * b.stride[0], vocab);
        each[size_t(i)] = compare(p, q, text[size_t(at + i + 1)]);
      });
      for (const Comparison& one : each)
        out.nll_before += one.nll_before, out.nll_after += one.nll_after, out.kl += one.kl, out.scored += one.scored;
    }
    caches[0].close(sequences[0]), caches[1].close(sequences[1]);
  }
  const auto n = double(std::max<int64_t>(out.scored, 1));
  out.nll_before /= n, out.nll_after /= n, out.kl /= n;
  return out;
}

}  // namespace mla
