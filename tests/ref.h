// The operations of a device in double precision, written from their definitions, for kernels to be checked against.
#pragma once

#include "core/quant.h"
#include "core/random.h"
#include "device/device.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace mla::ref {

using Row = std::vector<double>;
using Matrix = std::vector<Row>;

inline std::vector<float> random_floats(int64_t n, uint64_t seed, double scale = 1) {
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(scale * random_normal(seed, i));
  return x;
}

// Random bytes that are sound blocks of any type: scales are small positive or negative halves.
inline std::vector<std::byte> random_blocks(DType type, int64_t n, uint64_t seed) {
  const DTypeInfo t = info(type);
  std::vector<std::byte> bytes(static_cast<size_t>(row_bytes(type, n)));
  if (!is_quantised(type)) {
    quantise(type, random_floats(n, seed, 0.5).data(), bytes.data(), n);
    return bytes;
  }
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::byte(random_bits(seed, i) >> 13);
  auto put_half = [&](int64_t block, int at) {
    const uint16_t half = f32_to_f16(float(0.02 * random_normal(seed + 1, uint64_t(block * 300 + at))));
    bytes[size_t(block * t.block_bytes + at)] = std::byte(half);
    bytes[size_t(block * t.block_bytes + at + 1)] = std::byte(half >> 8);
  };
  for (int64_t b = 0; b < n / t.block; ++b) {
    put_half(b, type == DType::q6_k ? 208 : 0);
    if (type == DType::q4_1 || type == DType::q4_k || type == DType::q5_k) put_half(b, 2);
  }
  return bytes;
}

inline Matrix to_double(const float* x, int64_t rows, int64_t cols, int64_t stride) {
  Matrix m(static_cast<size_t>(rows), Row(static_cast<size_t>(cols)));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) m[size_t(i)][size_t(j)] = double(x[i * stride + j]);
  return m;
}

inline double dot(const Row& a, const Row& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

inline Row product(const Matrix& w, const Row& x) {
  Row y;
  for (const Row& row : w) y.push_back(dot(row, x));
  return y;
}

inline Row ffn(const Matrix& gate, const Matrix& up, const Matrix& down, const Row& x) {
  Row g = product(gate, x);
  const Row u = product(up, x);
  for (size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
  return product(down, g);
}

inline Row rms_norm(const Row& x, const Row& weight, double eps) {
  const double scale = 1 / std::sqrt(dot(x, x) / double(x.size()) + eps);
  Row y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] * scale * weight[i]);
  return y;
}

// Rotates the pairs of x by angles; pairs are neighbours or halves.
inline Row rope(const Row& x, const Row& angles, bool interleaved) {
  Row y = x;
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    y[a] = x[a] * std::cos(angles[i]) - x[b] * std::sin(angles[i]);
    y[b] = x[a] * std::sin(angles[i]) + x[b] * std::cos(angles[i]);
  }
  return y;
}

struct Route {
  std::vector<int> expert;
  Row weight;
};

inline Route route(const Row& logits, const RouterConfig& c) {
  const size_t n = logits.size(), k = size_t(c.top_k);
  Row score(n);
  const double most = *std::max_element(logits.begin(), logits.end());
  for (size_t i = 0; i < n; ++i) score[i] = std::exp(logits[i] - most);
  const double total = std::accumulate(score.begin(), score.end(), 0.0);
  for (double& s : score) s /= total;
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (c.gating == Gating::group_limited_greedy) {
    const size_t size = n / size_t(c.groups);
    std::vector<size_t> groups(static_cast<size_t>(c.groups));
    std::iota(groups.begin(), groups.end(), size_t(0));
    auto of = [&](size_t g) { return *std::max_element(score.begin() + long(g * size), score.begin() + long((g + 1) * size)); };
    std::stable_sort(groups.begin(), groups.end(), [&](size_t a, size_t b) { return of(a) > of(b); });
    groups.resize(size_t(c.top_groups));
    std::erase_if(order, [&](int e) { return std::find(groups.begin(), groups.end(), size_t(e) / size) == groups.end(); });
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[size_t(a)] > score[size_t(b)]; });
  order.resize(k);
  Route r{order, {}};
  double sum = 0;
  for (int e : order) sum += score[size_t(e)];
  for (int e : order) r.weight.push_back(score[size_t(e)] * (c.renormalise && k > 1 ? 1 / sum : double(c.scale)));
  return r;
}

// Largest difference, as a share of the reference's root mean square.
inline double relative_error(const float* y, const Row& reference) {
  double worst = 0, square = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double error = std::fabs(double(y[i]) - reference[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    square += reference[i] * reference[i];
  }
  return worst / std::sqrt(square / double(reference.size()) + 1e-300);
}

}  // namespace mla::ref
