// Codes of e4m3 as other numbers: its exponent differs from theirs in width and bias alone.
#pragma once

#include "cuda/elements.cuh"

#include <cuda_fp16.h>

#include <cstdint>

namespace mla::cuda {

// Two codes of e4m3 in bytes 1 and 3, as bf16 of 2^-120 times their values.
__device__ inline uint32_t widen_codes(uint32_t x) { return (x >> 4 & 0x07f007f0) | (x & 0x80008000); }

__device__ inline uint32_t scale_pair(uint32_t pair, __nv_bfloat162 by) {
  return as_word(__hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), by));
}

// A word's codes `2 which` and `2 which + 1`, exactly.
__device__ inline uint32_t f8_pair(uint32_t word, int which) {
  return scale_pair(widen_codes(__byte_perm(word, 0, which ? 0x3424 : 0x1404)), __floats2bfloat162_rn(0x1p120f, 0x1p120f));
}

__device__ inline uint32_t f16_pair(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t multiply_f16_pairs(uint32_t x, uint32_t y) {
  const __half2 pair = __hmul2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A word's four codes as f16, exactly.
__device__ inline uint2 codes_f16(uint32_t codes) {
  uint2 x;
  asm("{.reg .b16 low, high;\n"  // a word shifted in C++ would cost the shift, halves of a register cost nothing
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(x.x), "=r"(x.y)
      : "r"(codes));
  return x;
}

// Codes of q4_0 in nibbles i and i + 4 of a word, neighbours in the row (pack.h). Nibbles become the low bits of 128 + nibble in bf16; less
// 136, that is the code.
__device__ inline __nv_bfloat162 nibble_pair(uint32_t word, int i) {
  const uint32_t pair = (word >> (4 * i) & 0x000f000f) | 0x43004300;
  return __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&pair), __floats2bfloat162_rn(136, 136));
}

__device__ inline float half_of(uint32_t halves, int which) { return __half2float(__ushort_as_half(uint16_t(halves >> (16 * which)))); }

__device__ inline float code_value(uint8_t code) {
  return __uint_as_float(uint32_t(code & 0x7f) << 20 | uint32_t(code & 0x80) << 24) * 0x1p120f;
}

}  // namespace mla::cuda
