// A Step around one layer, with a cache of that layer alone.
#include "lowrank/layer_run.h"

#include "core/check.h"
#include "core/threads.h"
#include "model/rope.h"

#include <cblas.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace mla {
namespace {

LatentCache one_layer_cache(const Config& config, int64_t window, int64_t windows) {
  const int64_t page = LatentCache::page_tokens, tokens = (window + page - 1) / page * page * windows;
  LatentCache cache(1, {config.kv_layout(), DType::f32}, tokens);
  for (int64_t i = 0; i < windows; ++i) CHECK(cache.grow(cache.open(), window), "no room for window {}", i);
  return cache;
}

}  // namespace

LayerRun::LayerRun(const Config& config, std::vector<double> frequencies, Device& device, int64_t window, int64_t windows)
    : config_(config),
      device_(device),
      window_(window),
      cache_(one_layer_cache(config, window, windows)),
      frequencies_(std::move(frequencies)) {
  std::vector<int32_t> positions;
  for (int64_t i = 0; i < windows; ++i)
    for (int64_t t = 0; t < window; ++t) positions.push_back(int32_t(t)), slots_.push_back(cache_.slot(int(i), t));
  cos_sin_.resize(positions.size() * frequencies_.size() * 2);
  rope_table(frequencies_, rope_magnitude(config), positions, cos_sin_.data());
}

template <class Run>
void LayerRun::run(int64_t rows, const Run& what) {
  CHECK(rows % window_ == 0 && rows <= int64_t(slots_.size()), "{} rows of windows of {}", rows, window_);
  arena_.reset();
  const Dump dump;
  Step step{config_, device_, arena_, cache_, MlaForm::expanded, dump, {}, {slots_.begin(), slots_.begin() + rows}, {}, {}};
  for (int64_t i = 0; i < rows / window_; ++i)
    step.spans.push_back({int32_t(i * window_), int32_t(window_), 0, 0, int32_t(window_), cache_.pages(int(i)).data()});
  step.cos_sin = view(cos_sin_.data(), DType::f32, {rows, int64_t(frequencies_.size()), 2});
  what(step);
}

void LayerRun::attend(const GqaWeights& w, Tensor x) {
  run(x.shape[0], [&](Step& step) { attend_gqa(step, 0, w, x); });
}
void LayerRun::attend_heads(const MlaWeights& w, Tensor x, Tensor heads) {
  run(x.shape[0], [&](Step& step) { attend_mla_heads(step, 0, w, x, heads); });
}

void LayerRun::project(const GqaWeights& w, Tensor inputs, Tensor queries, Tensor keys) {
  const auto rows = [](const Tensor& heads) { return view(heads.data, DType::f32, {heads.shape[0], heads.shape[1] * heads.shape[2]}); };
  run(inputs.shape[0], [&](Step& step) {
    device_.linear(inputs, {{w.q, w.q_bias, rows(queries)}, {w.k, w.k_bias, rows(keys)}});
    device_.rope(queries, step.cos_sin, config_.rope_interleaved);
    device_.rope(keys, step.cos_sin, config_.rope_interleaved);
  });
}

void LayerRun::feed_forward(const Layer& layer, Tensor x) {
  run(x.shape[0], [&](Step& step) { mla::feed_forward(step, layer, x); });
}

void threaded_product(Threads& threads, Transposed which, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, bool lower) {
  // Each block copies all of B into BLAS's own form, which blocks of 96 rows take a fifth of their time for. An even number suits two
  // processors, and the largest go first.
  const int64_t blocks = (m + 383) / 384 * 2, block = (m + blocks - 1) / blocks;
  const bool left = which == Transposed::left, right = which == Transposed::right;
  threads.parallel(blocks, [&](int64_t task, int) {
    const int64_t from = (blocks - 1 - task) * block;
    if (from >= m) return;
    const int64_t rows = std::min(block, m - from), cols = lower ? from + rows : n;
    cblas_sgemm(CblasRowMajor, left ? CblasTrans : CblasNoTrans, right ? CblasTrans : CblasNoTrans, blasint(rows), blasint(cols),
                blasint(k), 1, left ? a + from : a + from * lda, blasint(lda), b, blasint(ldb), 0, c + from * n, blasint(n));
  });
}

void Sums::add(const float* x, int64_t rows) {
  const int64_t n = gram_.rows;
  scratch_.assign(gram_.data.size(), 0);
  threaded_product(threads_, Transposed::left, n, n, rows, x, n, x, n, scratch_.data(), true);
  for (size_t i = 0; i < scratch_.size(); ++i) gram_.data[i] += double(scratch_[i]);
}

void Sums::add_cross(const float* x, const float* y, int64_t rows) {
  scratch_.resize(cross_.data.size());
  threaded_product(threads_, Transposed::left, cross_.rows, cross_.cols, rows, x, cross_.rows, y, cross_.cols, scratch_.data());
  for (size_t i = 0; i < scratch_.size(); ++i) cross_.data[i] += double(scratch_[i]);
}

Matrix Sums::gram() const {
  Matrix whole = gram_;
  for (int64_t i = 0; i < whole.rows; ++i)
    for (int64_t j = i + 1; j < whole.cols; ++j) whole(i, j) = whole(j, i);
  return whole;
}

namespace {

// e^x for x ≤ 0 to 2·10⁻⁷, in operations that compilers turn into vectors: 2^n 2^f with f in [−½, ½]. No less than 2⁻¹⁰⁰, so that products
// with probabilities are no denormal numbers, which many processors are slow at.
float exp_below_zero(float x) {
  const float y = std::max(x * 1.44269504F, -100.0F);
  const float shifted = y + 12582912.0F;  // rounds to an integer, which ends up in the low bits
  const float f = (y - (shifted - 12582912.0F)) * 0.693147181F;
  const auto n = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(12582912.0F);
  const float power = std::bit_cast<float>((n + 127) << 23);
  return power * (1 + f * (1 + f * (0.5F + f * (0.166666667F + f * (0.0416666667F + f * (0.00833333333F + f * 0.00138888889F))))));
}

}  // namespace

void causal_softmax(float* scores, int64_t from, int64_t rows, int64_t cols) {
  constexpr int64_t lanes = 8;  // of sums and maxima, so that compilers may turn them into vectors
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * cols;
    const int64_t seen = from + i + 1, whole = seen / lanes * lanes;
    float most[lanes], sum[lanes] = {};
    std::fill_n(most, lanes, row[0]);
    for (int64_t s = 0; s < whole; s += lanes)
      for (int64_t j = 0; j < lanes; ++j) most[j] = std::max(most[j], row[s + j]);
    for (int64_t s = whole; s < seen; ++s) most[0] = std::max(most[0], row[s]);
    const float highest = *std::max_element(most, most + lanes);
    for (int64_t s = 0; s < seen; ++s) row[s] = exp_below_zero(row[s] - highest);
    for (int64_t s = 0; s < whole; s += lanes)
      for (int64_t j = 0; j < lanes; ++j) sum[j] += row[s + j];
    for (int64_t s = whole; s < seen; ++s) sum[0] += row[s];
    const float scale = 1 / std::accumulate(sum, sum + lanes, 0.0F);
    for (int64_t s = 0; s < seen; ++s) row[s] *= scale;
    std::fill(row + seen, row + cols, 0.0F);
  }
}

DistanceSums::DistanceSums(const GqaShape& shape, int64_t window, Constant which)
    : shape_(shape), window_(window), weighted_(which == Constant::least_squares), paid_(size_t(shape.heads * window * shape.pairs())) {}

void DistanceSums::add(const Tensor& q, const Tensor& k, float scale, Threads& threads) {
  threads.parallel(shape_.heads, [&](int64_t head, int) { add_head(head, q, k, scale); });
}

std::vector<float> DistanceSums::energies(const Tensor& x, int64_t head) const {  // [T, d/2]; a rotation keeps them
  const int64_t F = shape_.pairs();
  std::vector<float> out(size_t(window_ * F), 1);
  for (int64_t t = 0; weighted_ && t < window_; ++t)
    for (int64_t f = 0; f < F; ++f) {
      const float* row = x.f32() + t * x.stride[0] + head * x.stride[1];
      const float a = row[shape_.interleaved ? 2 * f : f], b = row[shape_.interleaved ? 2 * f + 1 : f + F];
      out[size_t(t * F + f)] = a * a + b * b;
    }
  return out;
}

void DistanceSums::add_head(int64_t head, const Tensor& q, const Tensor& k, float scale) {
  const int64_t T = window_, F = shape_.pairs(), group = head / (shape_.heads / shape_.groups);
  std::vector<float> scores(size_t(score_tile_rows * T)), paid(size_t(T * F));
  const std::vector<float> queries = energies(q, head), keys = energies(k, group);
  for (int64_t from = 0; from < T; from += score_tile_rows) {
    const int64_t rows = std::min(score_tile_rows, T - from), cols = from + rows;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blasint(rows), blasint(cols), blasint(shape_.head_dim), scale,
                q.f32() + from * q.stride[0] + head * q.stride[1], blasint(q.stride[0]), k.f32() + group * k.stride[1],
                blasint(k.stride[0]), 0, scores.data(), blasint(cols));
    causal_softmax(scores.data(), from, rows, cols);
    for (int64_t t = from; t < cols; ++t) {
      const float* query = queries.data() + t * F;
      // Attention to the first token is about what it is, not how far away.
      for (int64_t s = weighted_ ? 1 : 0; s <= t; ++s) {
        const float p = scores[size_t((t - from) * cols + s)];
        const float* key = keys.data() + s * F;
        float* to = paid.data() + (t - s) * F;
        for (int64_t f = 0; f < F; ++f) to[f] += p * query[f] * key[f];
      }
    }
  }
  double* sum = paid_.data() + head * T * F;
  for (size_t i = 0; i < paid.size(); ++i) sum[i] += double(paid[i]);
}

std::vector<std::complex<double>> DistanceSums::constants(const std::vector<double>& frequencies) const {
  const int64_t F = shape_.pairs();
  std::vector<std::complex<double>> out(size_t(shape_.heads * F));
  for (int64_t f = 0; f < F; ++f)
    for (int64_t head = 0; head < shape_.heads; ++head) {
      std::complex<double> turned = 0;
      double whole = 1e-30;
      for (int64_t distance = 0; distance < window_; ++distance) {
        const double paid = paid_[size_t((head * window_ + distance) * F + f)];
        turned += paid * std::polar(1.0, -frequencies[size_t(f)] * double(distance));
        whole += paid;
      }
      out[size_t(head * F + f)] = turned / whole;
    }
  return out;
}

}  // namespace mla
