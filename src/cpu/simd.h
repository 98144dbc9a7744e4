// The small set of 16-lane vectors that every kernel is written with, once. Each leaf (isa_*.cpp) compiles the kernels for one
// instruction set; everything here and in them has internal linkage, so that no code for a newer machine leaks into the rest.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_plain.h"
#endif

// Every implementation defines:
//   f32x16    splat, zero_f32, load(p), load(p, n) (zeros beyond n), store(p, x), store(p, x, n), + - * /, fma(a, b, c) = a·b + c,
//             max, min, abs, sqrt, sum(x), top(x) over the lanes, where_less(a, b, x, y) = a < b ? x : y
//   i32x16    splat_i32, load_i32(p), + -, shift_left<n>, shift_right<n> (arithmetic), to_f32, to_i32 (nearest even), scale_2(x, n) = x ·
//   2^n u8x16     load_u8x16, & |, shift_right_u8<n>, widen_u8, widen_i8 (to f32x16) bytes64   load_bytes, splat_bytes, renew, & |,
//   shift_right_bits<n>, shift_left_bits<n> (on 16-bit units: mask afterwards) bf16x32   load_bf16x32, splat_bf16_pair(p), to_bf16x32(low,
//   high), store_bf16x32, widen_even, widen_odd, max_magnitude(x, y) = max(x, |y|),
//             interleave_low, interleave_high, pair_bf16(even, odd); transpose(f32x16[16])
//   f32_dots  zero_dots, add_dots(acc, x, y) of f32x16 or bf16x32, sum_quads, sum_quarters (of f32x16)
//   i16x32    load_i16x32, store_i16x32, splat_i16_pair(p), pair_i16(even, odd) of i32x16, interleave_low, interleave_high,
//             store_i16(p, i32x16), dot_i16(acc, a, b): acc[i] += a[2i]·b[2i] + a[2i+1]·b[2i+1], in 32 bits
//   memory    load_f16, load_bf16, load_i8 (p and p, n), store_f16, store_bf16, store_i8 (p, x and p, x, n; i8 takes whole numbers in
//   range) dots      dot_u8(acc, u, s4): acc[i] += Σ_{c<4} u8[4i+c] · s8 s4[c] for codes u ≤ 127; dot_u8(acc, u, s) with a vector of s8;
//             dot_code(acc, u, s4): the same for any u8, where u counts from code_bias: acc[i] += Σ (u8 - (128 - code_bias)) · s8;
//             dot_bf16(acc, a, b): acc[i] += a[2i]·b[2i] + a[2i+1]·b[2i+1]
//   constants isa_has_bf16, isa_has_i16 (dots of that kind are the fastest for attention), code_bias, vector_registers, dot_chains (chains
//   of int8 dots that hide the latency of one)
namespace mla {
namespace {

// exp for lanes in float range, relative error 2e-7; below -87.3 (and for -inf) exactly 0, and above 88.3 clamped.
inline f32x16 exp(f32x16 x) {
  const f32x16 low = splat(-87.3f), clamped = max(low, min(x, splat(88.3f)));
  const i32x16 n = to_i32(clamped * splat(1.44269504088896341f));
  const f32x16 whole = to_f32(n);
  f32x16 r = fma(whole, splat(-0.693359375f), clamped);  // ln 2 in two parts
  r = fma(whole, splat(2.12194440e-4f), r);
  f32x16 p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return where_less(x, low, zero_f32(), scale_2(p, n));
}

// x / (1 + exp(-x))
inline f32x16 silu(f32x16 x) { return x / (splat(1.0f) + exp(zero_f32() - x)); }

// Brings the line at p closer, for streams the hardware does not foresee.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace mla
