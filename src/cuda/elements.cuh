// What several kernels do to a row's elements.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace mla::cuda {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

__device__ inline uint32_t as_word(__nv_bfloat162 x) { return *reinterpret_cast<const uint32_t*>(&x); }
__device__ inline uint32_t bf16_pair(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Of the four lanes that have a row among the matrix units' results.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// 2^x; less than 2^-126 is 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same of whole numbers up to 127.
__device__ inline float power_of_two(int x) { return __int_as_float(max(x + 127, 0) << 23); }

// Four elements of a row of f32 from `column` on, zeros beyond its end. aligned: whether a row's fours are at multiples of 16 bytes.
__device__ inline float4 four(const float* row, int column, int cols, bool aligned) {
  if (aligned && column + 4 <= cols) return *reinterpret_cast<const float4*>(row + column);
  float4 x{};
  if (column < cols) x.x = row[column];
  if (column + 1 < cols) x.y = row[column + 1];
  if (column + 2 < cols) x.z = row[column + 2];
  if (column + 3 < cols) x.w = row[column + 3];
  return x;
}
__device__ inline float4 four(const float* row, int column, int cols) {
  return four(row, column, cols, reinterpret_cast<uintptr_t>(row + column) % 16 == 0);
}

__device__ inline float silu(float x) { return x / (1 + __expf(-x)); }

}  // namespace mla::cuda
