// A Step around one layer, with a cache of that layer alone.
#include "lowrank/layer_run.h"

#include "core/check.h"
#include "model/rope.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

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
void LayerRun::run(int64_t rows, const Dump& dump, const Run& what) {
  CHECK(rows % window_ == 0 && rows <= int64_t(slots_.size()), "{} rows of windows of {}", rows, window_);
  arena_.reset();
  Step step{config_, device_, arena_, cache_, MlaForm::expanded, dump, {}, {slots_.begin(), slots_.begin() + rows}, {}, {}};
  for (int64_t i = 0; i < rows / window_; ++i)
    step.spans.push_back({int32_t(i * window_), int32_t(window_), 0, 0, int32_t(window_), cache_.pages(int(i)).data()});
  step.cos_sin = view(cos_sin_.data(), DType::f32, {rows, int64_t(frequencies_.size()), 2});
  what(step);
}

void LayerRun::attend(const GqaWeights& w, Tensor x, const Dump& dump) {
  run(x.shape[0], dump, [&](Step& step) { attend_gqa(step, 0, w, x); });
}
void LayerRun::attend(const MlaWeights& w, Tensor x, const Dump& dump) {
  run(x.shape[0], dump, [&](Step& step) { attend_mla(step, 0, w, x); });
}
void LayerRun::feed_forward(const Layer& layer, Tensor x) {
  run(x.shape[0], {}, [&](Step& step) { mla::feed_forward(step, layer, x); });
}

void Sums::add(const float* x, int64_t rows) {
  const auto n = blasint(gram_.rows);
  scratch_.assign(gram_.data.size(), 0);
  cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, n, blasint(rows), 1, x, n, 0, scratch_.data(), n);
  for (size_t i = 0; i < scratch_.size(); ++i) gram_.data[i] += double(scratch_[i]);
}

void Sums::add_cross(const float* x, const float* y, int64_t rows) {
  const auto m = blasint(cross_.rows), n = blasint(cross_.cols);
  scratch_.resize(cross_.data.size());
  cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, m, n, blasint(rows), 1, x, m, y, n, 0, scratch_.data(), n);
  for (size_t i = 0; i < scratch_.size(); ++i) cross_.data[i] += double(scratch_[i]);
}

Matrix Sums::gram() const {
  Matrix whole = gram_;
  for (int64_t i = 0; i < whole.rows; ++i)
    for (int64_t j = i + 1; j < whole.cols; ++j) whole(i, j) = whole(j, i);
  return whole;
}

ConstantSums::ConstantSums(const GqaShape& shape, const std::vector<double>& frequencies, int64_t window, Constant which)
    : shape_(shape), window_(window), weighted_(which == Constant::least_squares) {
  for (int64_t t = 0; t < window; ++t)
    for (double f : frequencies) {
      cos_.push_back(float(std::cos(f * double(t))));
      sin_.push_back(float(std::sin(f * double(t))));
    }
  scores_.resize(size_t(window * window));
  weighted_keys_.resize(size_t(window * 3 * shape.pairs()));
  seen_.resize(weighted_keys_.size());
  numerator_.resize(size_t(shape.heads * shape.pairs()));
  denominator_.resize(numerator_.size());
}

double ConstantSums::squared(const float* row, int64_t pair) const {
  const float a = row[shape_.interleaved ? 2 * pair : pair], b = row[shape_.interleaved ? 2 * pair + 1 : pair + shape_.pairs()];
  return double(a) * a + double(b) * b;  // a rotation keeps it
}

void ConstantSums::add(const Tensor& q, const Tensor& k, float scale) {
  for (int64_t head = 0; head < shape_.heads; ++head) add_head(head, q, k, scale);
}

// Σ P(t, s) |q_t|² |k_s|² e^{iθ(s−t)}, over the same without the exponential: one product of P with the keys' energies, times cosine,
// sine and 1, and then a sum over t.
void ConstantSums::add_head(int64_t head, const Tensor& q, const Tensor& k, float scale) {
  const int64_t T = window_, F = shape_.pairs(), d = shape_.head_dim, g = head / (shape_.heads / shape_.groups);
  const float* queries = q.f32() + head * q.stride[1];
  const float* keys = k.f32() + g * k.stride[1];
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blasint(T), blasint(T), blasint(d), scale, queries, blasint(q.stride[0]), keys,
              blasint(k.stride[0]), 0, scores_.data(), blasint(T));
  for (int64_t t = 0; t < T; ++t) {
    float* row = scores_.data() + t * T;
    const float most = *std::max_element(row, row + t + 1);
    float sum = 0;
    for (int64_t s = 0; s <= t; ++s) sum += row[s] = std::exp(row[s] - most);
    for (int64_t s = 0; s <= t; ++s) row[s] /= sum;
    std::fill(row + t + 1, row + T, 0.0F);
    if (weighted_) row[0] = 0;  // attention to the first token is about what it is, not how far away
  }
  for (int64_t s = 0; s < T; ++s)
    for (int64_t f = 0; f < F; ++f) {
      const float energy = weighted_ ? float(squared(keys + s * k.stride[0], f)) : 1;
      float* to = weighted_keys_.data() + s * 3 * F + f;
      to[0] = energy * cos_[size_t(s * F + f)];
      to[F] = energy * sin_[size_t(s * F + f)];
      to[2 * F] = energy;
    }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, blasint(T), blasint(3 * F), blasint(T), 1, scores_.data(), blasint(T),
              weighted_keys_.data(), blasint(3 * F), 0, seen_.data(), blasint(3 * F));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t f = 0; f < F; ++f) {
      const double energy = weighted_ ? squared(queries + t * q.stride[0], f) : 1;
      const float* from = seen_.data() + t * 3 * F + f;
      const std::complex<double> back(cos_[size_t(t * F + f)], -sin_[size_t(t * F + f)]);
      numerator_[size_t(head * F + f)] += energy * back * std::complex<double>(from[0], from[F]);
      denominator_[size_t(head * F + f)] += energy * double(from[2 * F]);
    }
}

std::vector<std::complex<double>> ConstantSums::constants() const {
  std::vector<std::complex<double>> out = numerator_;
  for (size_t i = 0; i < out.size(); ++i) out[i] /= std::max(denominator_[i], 1e-30);
  return out;
}

}  // namespace mla
