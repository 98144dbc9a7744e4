// Sampling: the options bend the logits, filters keep the likely tokens, and one counter-based random number picks among them.
#include "model/sample.h"

#include "core/check.h"
#include "core/random.h"

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

int32_t arg_max(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 1; i < logits.size(); ++i)
    if (logits[i] > logits[best] || std::isnan(logits[best])) best = i;
  if (!std::isfinite(logits[best])) fail("the model's logits are not finite, the best is {}; is the checkpoint damaged?", logits[best]);
  return int32_t(best);
}

// What the options change before any choice: biases, then the penalty of tokens that are there already.
std::vector<float> bend(std::span<const float> logits, std::span<const int32_t> history, const SamplingOptions& options) {
  std::vector<float> bent(logits.begin(), logits.end());
  for (const auto& [id, bias] : options.logit_bias) bent[size_t(id)] += bias;
  if (options.repetition_penalty == 1) return bent;
  const auto penalty = float(options.repetition_penalty);
  std::vector<int32_t> seen(history.begin(), history.end());
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (int32_t id : seen) {
    float& logit = bent[size_t(id)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
  return bent;
}

// exp((logit - best) / temperature) of each candidate.
std::vector<double> odds(std::span<const Candidate> candidates, float best, double temperature) {
  std::vector<double> p(candidates.size());
  const auto inverse = float(1 / temperature);
  for (size_t i = 0; i < p.size(); ++i) p[i] = std::exp((candidates[i].logit - best) * inverse);
  return p;
}

// Keeps the fewest candidates, best first, that have the share top_p of the probability. Sorts no more of them than it takes.
void keep_nucleus(std::vector<Candidate>& candidates, float best, const SamplingOptions& options) {
  double total = 0;
  for (double p : odds(candidates, best, options.temperature)) total += p;
  for (size_t sorted = 64;; sorted *= 4) {
    sorted = std::min(sorted, candidates.size());
    std::partial_sort(candidates.begin(), candidates.begin() + ptrdiff_t(sorted), candidates.end(), better);
    const std::vector<double> p = odds(std::span(candidates).first(sorted), best, options.temperature);
    double sum = 0;
    for (size_t i = 0; i < sorted; ++i) {
      sum += p[i];
      if (sum >= options.top_p * total) return candidates.resize(i + 1);
    }
    if (sorted == candidates.size()) return;
  }
}

int32_t draw(std::span<const float> logits, const SamplingOptions& options, int64_t position) {
  const float best = logits[size_t(arg_max(logits))];
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > -INFINITY) candidates.push_back({logits[i], int32_t(i)});
  if (options.top_k > 0 && size_t(options.top_k) < candidates.size()) {
    std::partial_sort(candidates.begin(), candidates.begin() + options.top_k, candidates.end(), better);
    candidates.resize(size_t(options.top_k));
  }
  if (options.top_p < 1) keep_nucleus(candidates, best, options);
  if (options.min_p > 0) {
    const double least = best + options.temperature * std::log(options.min_p);
    std::erase_if(candidates, [&](const Candidate& c) { return c.logit < least; });
  }
  const std::vector<double> p = odds(candidates, best, options.temperature);
  double total = 0;
  for (double x : p) total += x;
  double left = random_uniform(options.seed, uint64_t(position)) * total;
  for (size_t i = 0; i < p.size(); ++i)
    if ((left -= p[i]) < 0) return candidates[i].id;
  return candidates.back().id;  // rounding
}

void add_logprobs(std::span<const float> logits, int alternatives, Sampled& out) {
  const float best = logits[size_t(arg_max(logits))];
  double sum = 0;
  for (float x : logits) sum += std::exp(x - best);
  const double norm = best + std::log(sum);
  out.logprob = float(logits[size_t(out.token)] - norm);
  std::vector<Candidate> candidates(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates[i] = {logits[i], int32_t(i)};
  const size_t n = std::min(size_t(alternatives), candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + ptrdiff_t(n), candidates.end(), better);
  for (size_t i = 0; i < n; ++i) out.alternatives.emplace_back(candidates[i].id, float(candidates[i].logit - norm));
}

}  // namespace

bool is_plain(const SamplingOptions& o) {
  return o.top_k == 0 && o.top_p == 1 && o.min_p == 0 && o.repetition_penalty == 1 && o.logit_bias.empty() && !o.logprobs;
}

void check_sampling(const SamplingOptions& o, int64_t vocab_size) {
  if (!(o.temperature >= 0 && o.temperature <= 100))
    fail_input("the temperature is {}; give a number from 0 (greedy) to 100", o.temperature);
  if (o.top_k < 0) fail_input("top-k is {}; give 1 or more, or 0 for off", o.top_k);
  if (!(o.top_p > 0 && o.top_p <= 1)) fail_input("top-p is {}; give a share above 0, up to 1 (off)", o.top_p);
  if (!(o.min_p >= 0 && o.min_p <= 1)) fail_input("min-p is {}; give a share from 0 (off) to 1", o.min_p);
  if (!(o.repetition_penalty > 0 && o.repetition_penalty <= 100))
    fail_input("the repetition penalty is {}; give a factor above 0, 1 for off", o.repetition_penalty);
  if (o.logprobs && (*o.logprobs < 0 || *o.logprobs > 20)) fail_input("logprobs is {}; give 0 to 20 alternatives", *o.logprobs);
  for (const auto& [id, bias] : o.logit_bias) {
    if (id < 0 || id >= vocab_size) fail_input("the logit bias is for token {}, and the vocabulary has {}", id, vocab_size);
    if (std::isnan(bias) || bias == INFINITY) fail_input("the logit bias of token {} is {}; give a number", id, bias);
  }
}

Sampled sample(std::span<const float> logits, std::span<const int32_t> history, const SamplingOptions& options, int64_t position) {
  CHECK(!logits.empty(), "no logits");
  check_sampling(options, int64_t(logits.size()));
  std::vector<float> bent;
  std::span<const float> used = logits;
  if (!options.logit_bias.empty() || options.repetition_penalty != 1) used = bent = bend(logits, history, options);
  Sampled out{options.temperature == 0 ? arg_max(used) : draw(used, options, position), 0, {}};
  if (options.logprobs) add_logprobs(logits, *options.logprobs, out);
  return out;
}

}  // namespace mla
