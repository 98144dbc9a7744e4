// What the machine can do at best: a stream through memory, and chains of dots that never leave the registers.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#if defined(__AMX_BF16__)
#include "cpu/amx.h"
#endif

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

// Makes x an unknown to the compiler.
template <class T>
inline T unknown(T x) {
  asm volatile("" : "+m"(x));
  return x;
}
[[maybe_unused]] inline void keep(float x) { unknown(x); }

// Rates of independent chains that stay in registers: as many as hide the latency of a step where there are registers for them. A round
// is 16 steps of each.
constexpr auto start_f32 = [](int i) { return splat(unknown(float(i))); };
constexpr auto start_i32 = [](int i) { return splat_i32(unknown(i)); };
constexpr int chains = vector_registers < 32 ? 4 : 16;

template <class Start, class Step>
inline auto run_chains(int64_t rounds, Start start, Step step) {
  decltype(start(0)) x[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) x[i] = start(i);
  for (int64_t r = 0; r < rounds; ++r) {
    for (int s = 0; s < 16; ++s)
#pragma GCC unroll 16
      for (int i = 0; i < chains; ++i) x[i] = step(x[i]);
  }
  auto sum = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < chains; ++i) sum = sum + x[i];
  return sum;
}

double int8_ops(int64_t rounds) {
  bytes64 u = splat_bytes(unknown(uint8_t(3)));
  const bytes64 s = splat_bytes(unknown(uint8_t(5)));
  const auto step = [&](i32x16 x) {
    renew(u);  // else products of the same factors are formed once
    return dot_u8(x, u, s);
  };
  keep(sum(to_f32(run_chains(rounds, start_i32, step))));
  return double(rounds) * 16 * chains * 64 * 2;
}

#if defined(__AMX_BF16__)
// With few registers: in many, tiles are slower where a core's other thread uses tiles, too (linear_amx_kernels.h).
double bf16_ops(int64_t rounds) {
  const WholeTiles tiles;
  for (int64_t r = 0; r < 4 * rounds; ++r) dot_tiles_bf16<0, 2, 3>(), dot_tiles_bf16<1, 2, 3>();
  return double(4 * rounds) * 2 * 16 * 16 * 32 * 2;
}
#else
double bf16_ops(int64_t rounds) {
  const bf16x32 a = to_bf16x32(splat(1.0f), splat(unknown(0.5f))), b = to_bf16x32(splat(unknown(0.25f)), splat(1.0f));
  keep(sum(run_chains(rounds, start_f32, [&](f32x16 x) { return dot_bf16(x, a, b); })));
  return double(rounds) * 16 * chains * 32 * 2;
}
#endif

double f32_ops(int64_t rounds) {
  const f32x16 a = splat(unknown(0.999f)), b = splat(unknown(0.5f));
  keep(sum(run_chains(rounds, start_f32, [&](f32x16 x) { return fma(x, a, b); })));
  return double(rounds) * 16 * chains * 16 * 2;
}

double i16_ops(int64_t rounds) {
  const i32x16 one = splat_i32(unknown(1));
  const i16x32 b = pair_i16(splat_i32(unknown(3)), one);
  i16x32 a = pair_i16(one, splat_i32(unknown(2)));
  const auto step = [&](i32x16 x) {
    renew(a);
    return dot_i16(x, a, b);
  };
  keep(sum(to_f32(run_chains(rounds, start_i32, step))));
  return double(rounds) * 16 * chains * 32 * 2;
}

constexpr void add_probe(Kernels& k) {
  k.read = read_stream;
  k.int8_ops = int8_ops;
  k.bf16_ops = bf16_ops;
  if (isa_has_i16) k.i16_ops = i16_ops;
  k.f32_ops = f32_ops;
}

}  // namespace
}  // namespace mla
