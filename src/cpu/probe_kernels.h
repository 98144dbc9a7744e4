// What the machine can do at best: a stream through memory, and chains of dots that never leave the registers.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace mla {
namespace {

float read_stream(const std::byte* p, int64_t bytes) {
  bytes64 any[4] = {splat_bytes(0), splat_bytes(0), splat_bytes(0), splat_bytes(0)};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      prefetch(p + i + 4096 + 64 * j);
      any[j] = any[j] | load_bytes(p + i + 64 * j);
    }
  }
  return sum(to_f32(dot_u8(splat_i32(0), (any[0] | any[1]) | (any[2] | any[3]), splat_bytes(1))));
}

constexpr int chains = vector_registers / 2 > 12 ? 12 : vector_registers / 4;

// Runs step on independent accumulators, `rounds` × 16 times each.
template <class Vector, class Step>
inline void run_chains(Vector (&acc)[chains], int64_t rounds, Step step) {
  for (int64_t r = 0; r < rounds * 16; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) acc[c] = step(acc[c]);
#if defined(__GNUC__)
    asm volatile("" ::: "memory");
#endif
  }
}

// Makes the result matter to the compiler.
inline void keep(f32x16 x) {
  [[maybe_unused]] static volatile float sink;
  sink = sum(x);
}

double int8_ops(int64_t rounds) {
  i32x16 acc[chains];
  for (int c = 0; c < chains; ++c) acc[c] = splat_i32(c);
  const bytes64 u = splat_bytes(uint8_t(rounds & 63)), s = splat_bytes(uint8_t(rounds & 7));
  run_chains(acc, rounds, [&](i32x16 a) { return dot_u8(a, u, s); });
  for (int c = 1; c < chains; ++c) acc[0] = acc[0] + acc[c];
  keep(to_f32(acc[0]));
  return double(rounds) * 16 * chains * 64 * 2;
}

double bf16_ops(int64_t rounds) {
  f32x16 acc[chains];
  for (int c = 0; c < chains; ++c) acc[c] = splat(float(c));
  const bf16x32 a = to_bf16x32(splat(1.0f), splat(float(rounds & 3))), b = to_bf16x32(splat(float(rounds & 1)), splat(1.0f));
  run_chains(acc, rounds, [&](f32x16 x) { return dot_bf16(x, a, b); });
  for (int c = 1; c < chains; ++c) acc[0] = acc[0] + acc[c];
  keep(acc[0]);
  return double(rounds) * 16 * chains * 32 * 2;
}

double f32_ops(int64_t rounds) {
  f32x16 acc[chains];
  for (int c = 0; c < chains; ++c) acc[c] = splat(float(c));
  const f32x16 a = splat(1 + float(rounds & 1) * 1e-9f), b = splat(float(rounds & 3) * 1e-9f);
  run_chains(acc, rounds, [&](f32x16 x) { return fma(x, a, b); });
  for (int c = 1; c < chains; ++c) acc[0] = acc[0] + acc[c];
  keep(acc[0]);
  return double(rounds) * 16 * chains * 16 * 2;
}

constexpr void add_probe(Kernels& k) {
  k.read = read_stream;
  k.int8_ops = int8_ops;
  k.bf16_ops = bf16_ops;
  k.f32_ops = f32_ops;
}

}  // namespace
}  // namespace mla
