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

constexpr const char* text =
    "The lighthouse keeper climbed the stairs every evening, an hour before sunset. He trimmed the wick, filled the lamp with oil and "
    "wiped "
    "the salt from the windows. Then he sat down with his logbook and wrote what he had seen: three fishing boats on their way home, a "
    "steamer far out to the west, and clouds that would bring rain before the morning. ";

class Runs {
 public:
  explicit Runs(Session& session) : model_(session.model()) {
    constexpr size_t length = 2 * LatentCache::page_tokens + 3;
    // Sense where there is a tokenizer: on nonsense a model's answers are vague, and rounding moves them about.
    while (session.tokenizer() && ids_.size() < length)
      for (int32_t id : session.tokenizer()->encode(text, ids_.empty(), false)) ids_.push_back(id);
    for (size_t i = ids_.size(); i < length; ++i) ids_.push_back(int32_t(random_bits(5, i) % uint64_t(model_.config().vocab_size)));
    ids_.resize(length);
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
    return row(forward(chunks, cache), 1);
  }

  // The same, on a copy of a sequence that holds the first half.
  Logits forked() {
    LatentCache cache = make_cache(3);
    const int first = cache.open();
    const size_t half = length() / 2;
    const Chunk prefix{first, std::span(ids_).first(half), Chunk::Logits::none};
    forward(std::span(&prefix, 1), cache);
    return extend(cache, cache.fork(first), half, length());
  }

 private:
  LatentCache make_cache(int64_t sequences) const { return model_.make_cache(sequences * 256, DType::f32); }

  Tensor forward(std::span<const Chunk> chunks, LatentCache& cache) {
    return model_.to_host(model_.forward(chunks, cache, [](double) { throw_if_interrupted(); }));
  }

  Logits row(const Tensor& logits, int64_t i) const {
    CHECK(logits.data && i < logits.shape[0], "no logits");
    const float* from = logits.f32() + i * logits.stride[0];
    return {from, from + logits.shape[1]};
  }

  Logits extend(LatentCache& cache, int sequence, size_t from, size_t chunk) {
    Logits out;
    for (size_t at = from; at < length(); at += chunk) {
      const size_t n = std::min(chunk, length() - at);
      const bool last = at + n == length();
      const Chunk step{sequence, std::span(ids_).subspan(at, n), last ? Chunk::Logits::last : Chunk::Logits::none};
      const Tensor logits = forward(std::span(&step, 1), cache);
      if (last) out = row(logits, 0);
    }
    return out;
  }

  Model& model_;
  std::vector<int32_t> ids_;
};

// The root mean square of a - b as a share of b's spread (its standard deviation).
double difference(const Logits& a, const Logits& b) {
  double sum = 0, squares = 0, errors = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    sum += b[i];
    squares += double(b[i]) * b[i];
    errors += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
  }
  const double n = double(b.size()), variance = squares / n - sum / n * sum / n;
  return std::isfinite(errors) ? std::sqrt(errors / n / std::max(variance, 1e-30)) : INFINITY;
}

// Attention adds up in another order for one query than for many. With f32 weights that stays as small as it is; where products round
// their inputs to bf16 or int8, it tips some of these to the next number, and what comes out differs as much as rounding itself does.
// A mistake differs by the whole spread.
double tolerance(const Session& session) {
  double most = 1e-3;
  for (const StoredTensor& t : session.checkpoint().tensors())
    if (t.value.rank > 1) most = std::max(most, is_quantised(t.value.dtype) ? 0.3 : t.value.dtype == DType::f32 ? 1e-3 : 0.05);
  return most;
}

}  // namespace

std::vector<Check> check_model(Session& session, const std::function<void(double)>& progress) {
  Runs runs(session);
  std::vector<Check> out;
  progress(0);
  const Logits whole = runs.run(runs.length());
  if (difference(whole, whole) != 0) return {{"forward pass", Verdict::wrong, "the logits are not finite"}};
  const double allowed = tolerance(session);
  auto compare = [&](const char* name, const Logits& logits) {
    const double d = difference(logits, whole);
    out.push_back({name, d <= allowed ? Verdict::ok : Verdict::wrong,
                   fmt::format("off by {:.1e} of the logits' spread{}", d, d <= allowed ? "" : fmt::format(", more than {:g}", allowed))});
    progress(double(out.size()) / 8);
  };
  constexpr size_t page = LatentCache::page_tokens;
  for (const auto& [name, n] : {std::pair<const char*, size_t>{"chunks of 1 = at once", 1},
                                {"chunks of 7 = at once", 7},
                                {"chunks of a page less one = at once", page - 1},
                                {"chunks of a page and one = at once", page + 1}})
    compare(name, runs.run(n));
  compare("in a batch = alone", runs.batched());
  compare("on a forked prefix = cold", runs.forked());
  if (session.config().is_mla()) {
    compare("absorbed = chosen form", runs.run(runs.length(), MlaForm::absorbed));
    compare("expanded = chosen form", runs.run(runs.length(), MlaForm::expanded));
  }
  return out;
}

}  // namespace mla
