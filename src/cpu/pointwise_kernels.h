// Row-wise kernels: norms, rotation, softmax and the glue between products.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace mla {
namespace {

// Calls f(i, n) for vectors of n lanes; n is 16 but for the last.
template <class F>
inline void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) f(i, lanes);
  if (i < count) f(i, int(count - i));
}
inline f32x16 load_some(const float* p, int n) { return n == lanes ? load(p) : load(p, n); }
inline void store_some(float* p, f32x16 x, int n) { n == lanes ? store(p, x) : store(p, x, n); }

void rms_norm_row(const float* x, const float* weight, float eps, int64_t d, float* y) {
  f32x16 even = zero_f32(), odd = zero_f32();
  for_vectors(d, [&](int64_t i, int n) {
    const f32x16 v = load_some(x + i, n);
    even = fma(v, v, even);
    const f32x16 t = even;  // two chains in turn
    even = odd, odd = t;
  });
  const f32x16 mean = splat(sum(even + odd) / float(d) + eps);
  float root[lanes];
  store(root, splat(1.0f) / sqrt(mean));
  const f32x16 scale = splat(root[0]);
  for_vectors(d, [&](int64_t i, int n) { store_some(y + i, load_some(x + i, n) * scale * load_some(weight + i, n), n); });
}

// cos_sin [d / 2][2]
void rope_row(float* x, const float* cos_sin, int64_t d, bool interleaved) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    float &a = interleaved ? x[2 * i] : x[i], &b = interleaved ? x[2 * i + 1] : x[i + half];
    const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1], a0 = a, b0 = b;
    a = a0 * c - b0 * s;
    b = a0 * s + b0 * c;
  }
}

void softmax_row(float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  f32x16 total = zero_f32();
  for_vectors(n, [&](int64_t i, int m) {
    store_some(x + i, exp(load_some(x + i, m) - splat(most)), m);
    total = total + load_some(x + i, m);
  });
  const f32x16 all = splat(sum(total));
  for_vectors(n, [&](int64_t i, int m) { store_some(x + i, load_some(x + i, m) / all, m); });
}

void silu_mul_row(float* gate, const float* up, int64_t n) {
  for_vectors(n, [&](int64_t i, int m) { store_some(gate + i, silu(load_some(gate + i, m)) * load_some(up + i, m), m); });
}

void add_row(const float* x, float scale, int64_t n, float* y) {
  for_vectors(n, [&](int64_t i, int m) { store_some(y + i, fma(load_some(x + i, m), splat(scale), load_some(y + i, m)), m); });
}

void finish_row(const float* x, const float* bias, bool add, int64_t n, float* y) {
  for_vectors(n, [&](int64_t i, int m) {
    f32x16 v = load_some(x + i, m);
    if (bias) v = v + load_some(bias + i, m);
    if (add) v = v + load_some(y + i, m);
    store_some(y + i, v, m);
  });
}

constexpr void add_pointwise(Kernels& k) {
  k.rms_norm = rms_norm_row;
  k.rope = rope_row;
  k.softmax = softmax_row;
  k.silu_mul = silu_mul_row;
  k.add = add_row;
  k.finish = finish_row;
}

}  // namespace
}  // namespace mla
