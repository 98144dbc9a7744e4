// Codes of e4m3 as other numbers: its exponent differs from theirs in width and bias alone.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace mla::cuda {

// Two codes of e4m3 in bytes 1 and 3, as bf16 of 2^-120 times their values.
__device__ inline uint32_t widen_codes(uint32_t x) { return (x >> 4 & 0x07f007f0) | (x & 0x80008000); }

__device__ inline uint32_t scale_pair(uint32_t pair, __nv_bfloat162 by) {
  const __nv_bfloat162 y = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), by);
  return *reinterpret_cast<const uint32_t*>(&y);
}

__device__ inline float code_value(uint8_t code) {
  return __uint_as_float(uint32_t(code & 0x7f) << 20 | uint32_t(code & 0x80) << 24) * 0x1p120f;
}

}  // namespace mla::cuda
