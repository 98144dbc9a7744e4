// Attention and its derivative, window by window; probabilities are formed a tile of queries at a time, and again on the way back.
#include "lowrank/attention_fit.h"

#include "core/threads.h"
#include "lowrank/layer_run.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

constexpr double first_decay = 0.9, second_decay = 0.95;  // of Adam's means, short since a layer sees some hundred windows at most

std::vector<float> narrow(const double* from, int64_t n) { return {from, from + n}; }

// Of the first `counted` of each row's `cols` elements.
double root_mean_square(const std::vector<float>& x, int64_t cols, int64_t counted) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i)
    if (int64_t(i) % cols < counted) sum += double(x[i]) * double(x[i]);
  return std::sqrt(sum * double(cols) / double(counted) / double(std::max<size_t>(x.size(), 1)));
}

// The n rotary pairs (2i, 2i + 1) that each row starts with, by the angles of the row, or back by them.
void turn(float* rows, int64_t count, int64_t stride, const float* turns, int64_t n, bool back) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t p = 0; p < n; ++p) {
      float* pair = rows + t * stride + 2 * p;
      const float c = turns[2 * (t * n + p)], s = back ? -turns[2 * (t * n + p) + 1] : turns[2 * (t * n + p) + 1];
      const float re = pair[0], im = pair[1];
      pair[0] = re * c - im * s, pair[1] = re * s + im * c;
    }
}

}  // namespace

AttentionFit::AttentionFit(const FitShape& shape, const MlaMatrices& start, Threads& threads) : s_(shape), threads_(threads) {
  const int64_t h = s_.gqa.heads, d = s_.gqa.head_dim, r = s_.latent, D = s_.gqa.hidden, T = s_.window, w = s_.query_width();
  weights_.q = narrow(start.q.row(0), h * w * D);
  weights_.down = narrow(start.kv_a.row(0), r * D);
  weights_.rotary = narrow(start.kv_a.row(r), s_.d_R * D);
  weights_.o = narrow(start.o.row(0), s_.stream * h * d);
  for (int64_t i = 0; i < h; ++i) {
    weights_.uk.insert(weights_.uk.end(), start.kv_b.row(i * 2 * d), start.kv_b.row(i * 2 * d + d));
    weights_.uv.insert(weights_.uv.end(), start.kv_b.row(i * 2 * d + d), start.kv_b.row(i * 2 * d + d) + d * r);
  }
  gradient_ = mean_ = square_ = weights_;
  for (FitWeights* sums : {&mean_, &square_})
    for (std::vector<float>* x : sums->all()) std::ranges::fill(*x, 0.0F);
  const std::array<int64_t, 6> cols{D, D, D, r, r, h * d}, counted{s_.stream, s_.stream, s_.stream, r, r, h * d};
  for (size_t i = 0; i < spread_.size(); ++i) spread_[i] = root_mean_square(*weights_.all()[i], cols[i], std::min(cols[i], counted[i]));
  for (int64_t t = 0; t < T; ++t)
    for (double f : s_.frequencies) turns_.push_back(float(std::cos(f * double(t)))), turns_.push_back(float(std::sin(f * double(t))));
  for (std::vector<float>* x : {&queries_, &d_queries_}) x->resize(size_t(T * h * w));
  for (std::vector<float>* x : {&latent_, &d_latent_}) x->resize(size_t(T * r));
  for (std::vector<float>* x : {&keys_, &values_, &attended_, &d_keys_, &d_values_, &d_attended_}) x->resize(size_t(T * h * d));
  rotary_.resize(size_t(T * s_.d_R)), d_rotary_.resize(size_t(h * T * s_.d_R)), output_.resize(size_t(T * s_.stream));
}

double AttentionFit::error(const FitWindow& window) {
  forward(window);
  return subtract_target(window);
}

double AttentionFit::differentiate(const FitWindow& window) {
  const double error = this->error(window);
  backward(window);
  return error;
}

double AttentionFit::subtract_target(const FitWindow& window) {
  double error = 0;
  for (int64_t t = 0; t < s_.window; ++t)
    for (int64_t i = t * s_.stream; i < (t + 1) * s_.stream; ++i) {
      const float lacks = output_[size_t(i)] - window.target[i];
      error += double(window.weight[t]) * double(lacks) * double(lacks);
      output_[size_t(i)] = 2 * window.weight[t] * lacks;
    }
  return error;
}

void AttentionFit::forward(const FitWindow& window) {
  const int64_t T = s_.window, h = s_.gqa.heads, d = s_.gqa.head_dim, r = s_.latent, D = s_.gqa.hidden, w = s_.query_width();
  const auto n = int64_t(s_.frequencies.size());
  const auto project = [&](const float* x, int64_t width, const std::vector<float>& weights, int64_t rows, std::vector<float>& out) {
    threaded_product(threads_, Transposed::right, T, rows, width, x, width, weights.data(), width, out.data());
  };
  project(window.inputs, D, weights_.q, h * w, queries_);
  project(window.inputs, D, weights_.down, r, latent_);
  project(window.inputs, D, weights_.rotary, s_.d_R, rotary_);
  project(latent_.data(), r, weights_.uk, h * d, keys_);
  project(latent_.data(), r, weights_.uv, h * d, values_);
  turn(rotary_.data(), T, s_.d_R, turns_.data(), n, false);
  threads_.parallel(h, [&](int64_t head, int) {
    turn(queries_.data() + head * w + d, T, h * w, turns_.data(), n, false);
    attend(head, false);
  });
  project(attended_.data(), h * d, weights_.o, s_.stream, output_);
}

// output_ holds the gradient of the outputs.
void AttentionFit::backward(const FitWindow& window) {
  const int64_t T = s_.window, h = s_.gqa.heads, d = s_.gqa.head_dim, r = s_.latent, D = s_.gqa.hidden, w = s_.query_width();
  const int64_t d_R = s_.d_R, S = s_.stream;
  const auto n = int64_t(s_.frequencies.size());
  // Σ over tokens of an output's gradient times what was projected.
  const auto weigh = [&](const float* out, int64_t rows, const float* x, int64_t width, std::vector<float>& gradient) {
    threaded_product(threads_, Transposed::left, rows, width, T, out, rows, x, width, gradient.data());
  };
  threaded_product(threads_, Transposed::none, T, h * d, S, output_.data(), S, weights_.o.data(), h * d, d_attended_.data());
  weigh(output_.data(), S, attended_.data(), h * d, gradient_.o);
  threads_.parallel(h, [&](int64_t head, int) {
    attend(head, true);
    turn(d_queries_.data() + head * w + d, T, h * w, turns_.data(), n, true);
  });
  for (int64_t head = 1; head < h; ++head)
    for (int64_t i = 0; i < T * d_R; ++i) d_rotary_[size_t(i)] += d_rotary_[size_t(head * T * d_R + i)];
  turn(d_rotary_.data(), T, d_R, turns_.data(), n, true);
  weigh(d_queries_.data(), h * w, window.inputs, D, gradient_.q);
  weigh(d_rotary_.data(), d_R, window.inputs, D, gradient_.rotary);
  weigh(d_keys_.data(), h * d, latent_.data(), r, gradient_.uk);
  weigh(d_values_.data(), h * d, latent_.data(), r, gradient_.uv);
  std::vector<float> by_keys(d_latent_.size());
  threaded_product(threads_, Transposed::none, T, r, h * d, d_keys_.data(), h * d, weights_.uk.data(), r, by_keys.data());
  threaded_product(threads_, Transposed::none, T, r, h * d, d_values_.data(), h * d, weights_.uv.data(), r, d_latent_.data());
  for (size_t i = 0; i < by_keys.size(); ++i) d_latent_[i] += by_keys[i];
  weigh(d_latent_.data(), r, window.inputs, D, gradient_.down);
}

// One head: its outputs, or with `back` the gradients of its queries, keys and values from those of its outputs.
void AttentionFit::attend(int64_t head, bool back) {
  const int64_t T = s_.window, h = s_.gqa.heads, d = s_.gqa.head_dim, d_R = s_.d_R, w = s_.query_width();
  const auto stride = blasint(h * d), wide = blasint(w), width = blasint(d), q_stride = blasint(h * w);
  std::vector<float> keys(size_t(T * w)), d_keys(back ? size_t(T * w) : 0);
  for (int64_t t = 0; t < T; ++t) {
    std::copy_n(keys_.data() + (t * h + head) * d, d, keys.data() + t * w);
    std::copy_n(rotary_.data() + t * d_R, d_R, keys.data() + t * w + d);
  }
  std::vector<float> p(size_t(score_tile_rows * T)), d_p(back ? p.size() : 0);
  for (int64_t t = 0; back && t < T; ++t) std::fill_n(d_values_.data() + (t * h + head) * d, d, 0.0F);
  for (int64_t from = 0; from < T; from += score_tile_rows) {
    const int64_t rows = std::min(score_tile_rows, T - from), cols = from + rows;
    const auto m = blasint(rows), seen = blasint(cols);
    const float* query = queries_.data() + (from * h + head) * w;
    float* out = attended_.data() + (from * h + head) * d;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, seen, wide, s_.scale, query, q_stride, keys.data(), wide, 0, p.data(), seen);
    causal_softmax(p.data(), from, rows, cols);
    if (!back) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, width, seen, 1, p.data(), seen, values_.data() + head * d, stride, 0, out,
                  stride);
      continue;
    }
    const float* d_out = d_attended_.data() + (from * h + head) * d;
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, seen, width, m, 1, p.data(), seen, d_out, stride, 1, d_values_.data() + head * d,
                stride);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, seen, width, 1, d_out, stride, values_.data() + head * d, stride, 0, d_p.data(),
                seen);
    for (int64_t i = 0; i < rows; ++i) {  // of scores: P (dP − Σ P dP), and the sum is that of outputs and their gradients
      const float mean = cblas_sdot(width, out + i * stride, 1, d_out + i * stride, 1);
      for (int64_t s = i * cols; s < (i + 1) * cols; ++s) d_p[size_t(s)] = p[size_t(s)] * (d_p[size_t(s)] - mean) * s_.scale;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, wide, seen, 1, d_p.data(), seen, keys.data(), wide, 0,
                d_queries_.data() + (from * h + head) * w, q_stride);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, seen, wide, m, 1, d_p.data(), seen, query, q_stride, 1, d_keys.data(), wide);
  }
  for (int64_t t = 0; back && t < T; ++t) {
    std::copy_n(d_keys.data() + t * w, d, d_keys_.data() + (t * h + head) * d);
    std::copy_n(d_keys.data() + t * w + d, d_R, d_rotary_.data() + (head * T + t) * d_R);
  }
}

void AttentionFit::move(double rate) {
  ++steps_;
  const double first = 1 - std::pow(first_decay, double(steps_)), second = 1 - std::pow(second_decay, double(steps_));
  for (size_t k = 0; k < spread_.size(); ++k) {
    std::vector<float>&w = *weights_.all()[k], &g = *gradient_.all()[k], &m = *mean_.all()[k], &v = *square_.all()[k];
    const auto length = float(rate * spread_[k] / first), beta1 = float(first_decay), beta2 = float(second_decay);
    const auto correct = float(1 / second);
    constexpr int64_t block = 16384;
    threads_.parallel((int64_t(w.size()) + block - 1) / block, [&](int64_t task, int) {
      for (int64_t i = task * block; i < std::min(int64_t(w.size()), (task + 1) * block); ++i) {
        const auto j = size_t(i);
        m[j] = beta1 * m[j] + (1 - beta1) * g[j];
        v[j] = beta2 * v[j] + (1 - beta2) * g[j] * g[j];
        w[j] -= length * m[j] / (std::sqrt(v[j] * correct) + 1e-20F);
      }
    });
  }
}

void AttentionFit::put(MlaMatrices& m) const {
  const int64_t h = s_.gqa.heads, block = s_.gqa.head_dim * s_.latent;
  std::ranges::copy(weights_.q, m.q.row(0));
  std::ranges::copy(weights_.down, m.kv_a.row(0));
  std::ranges::copy(weights_.rotary, m.kv_a.row(s_.latent));
  std::ranges::copy(weights_.o, m.o.row(0));
  for (int64_t i = 0; i < h; ++i) {
    std::copy_n(weights_.uk.data() + i * block, block, m.kv_b.data.data() + i * 2 * block);
    std::copy_n(weights_.uv.data() + i * block, block, m.kv_b.data.data() + (i * 2 + 1) * block);
  }
}

}  // namespace mla
