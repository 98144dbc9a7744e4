// Runs a model in ways that must not make a difference, and compares the logits.
#include "cli/doctor.h"
#include "cli/interrupt.h"
#include "core/check.h"
#include "core/random.h"

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

using Logits = std::vector<float>;

class Runs {
 public:
  explicit Runs(Session& session) : model_(session.model()) {
    constexpr int64_t length = 2 * LatentCache::page_tokens + 3;
    for (int64_t i = 0; i < length; ++i) ids_.push_back(int32_t(random_bits(5, uint64_t(i)) % uint64_t(model_.config().vocab_size)));
  }

  size_t length() const { return ids_.size(); }

  // The logits behind the last token, with prompts run in chunks of n.
  Logits run(size_t chunk, MlaForm form = MlaForm::automatic) {
    LatentCache cache = make_cache(1);
    const int sequence = cache.open();
    model_.form = form;
    Logits out = extend(cache, sequence, 0, chunk);
    model_.form = MlaForm::automatic;
    return out;
  }

  // The same, as the second of three sequences in a step; the others are shorter.
  Logits batched() {
    LatentCache cache = make_cache(3);
    const std::span<const int32_t> all(ids_);
    const Chunk chunks[] = {{cache.open(), all.first(5), Chunk::Logits::last},
                            {cache.open(), all, Chunk::Logits::last},
                            {cache.open(), all.last(40), Chunk::Logits::last}};
    return row(model_.forward(chunks, cache), 1);
  }

  // The same, on a copy of a sequence that holds the first half.
  Logits forked() {
    LatentCache cache = make_cache(3);
    const int first = cache.open();
    const size_t half = length() / 2;
    const Chunk prefix{first, std::span(ids_).first(half), Chunk::Logits::none};
    model_.forward(std::span(&prefix, 1), cache);
    return extend(cache, cache.fork(first), half, length());
  }

 private:
  LatentCache make_cache(int64_t sequences) const { return model_.make_cache(sequences * 256, DType::f32); }

  Logits row(const Tensor& logits, int64_t i) const {
    CHECK(logits.data && i < logits.shape[0], "no logits");
    const float* from = logits.f32() + i * logits.stride[0];
    return {from, from + logits.shape[1]};
  }

  Logits extend(LatentCache& cache, int sequence, size_t from, size_t chunk) {
    Logits out;
    for (size_t at = from; at < length(); at += chunk) {
      throw_if_interrupted();
      const size_t n = std::min(chunk, length() - at);
      const bool last = at + n == length();
      const Chunk step{sequence, std::span(ids_).subspan(at, n), last ? Chunk::Logits::last : Chunk::Logits::none};
      const Tensor logits = model_.forward(std::span(&step, 1), cache);
      if (last) out = row(logits, 0);
    }
    return out;
  }

  Model& model_;
  std::vector<int32_t> ids_;
};

// max |a - b| as a share of b's spread (its standard deviation).
double difference(const Logits& a, const Logits& b) {
  double sum = 0, squares = 0, most = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    sum += b[i];
    squares += double(b[i]) * b[i];
    most = std::max(most, std::fabs(double(a[i]) - b[i]));
    if (!std::isfinite(a[i])) return INFINITY;
  }
  const double mean = sum / double(b.size()), spread = std::sqrt(std::max(squares / double(b.size()) - mean * mean, 1e-30));
  return most / spread;
}

}  // namespace

std::vector<Check> check_model(Session& session, const std::function<void(double)>& progress) {
  Runs runs(session);
  std::vector<Check> out;
  progress(0);
  const Logits whole = runs.run(runs.length());
  if (difference(whole, whole) != 0) return {{"forward pass", Verdict::wrong, "the logits are not finite"}};
  // Quantised activations round differently in other shapes; what is really broken is off by the whole spread.
  auto compare = [&](const char* name, const Logits& logits, double tolerance) {
    const double d = difference(logits, whole);
    out.push_back(
        {name, d <= tolerance ? Verdict::ok : Verdict::wrong,
         fmt::format("off by {:.1e} of the logits' spread{}", d, d <= tolerance ? "" : fmt::format(", more than {:g}", tolerance))});
    progress(double(out.size()) / 8);
  };
  constexpr double close = 0.05;
  constexpr size_t page = LatentCache::page_tokens;
  for (const auto& [name, n] : {std::pair<const char*, size_t>{"chunks of 1 = at once", 1},
                                {"chunks of 7 = at once", 7},
                                {"chunks of a page less one = at once", page - 1},
                                {"chunks of a page and one = at once", page + 1}})
    compare(name, runs.run(n), close);
  compare("in a batch = alone", runs.batched(), close);
  compare("on a forked prefix = cold", runs.forked(), close);
  if (session.config().is_mla()) {
    compare("absorbed = chosen form", runs.run(runs.length(), MlaForm::absorbed), close);
    compare("expanded = chosen form", runs.run(runs.length(), MlaForm::expanded), close);
  }
  return out;
}

}  // namespace mla
