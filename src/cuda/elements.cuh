// What several kernels do to a row's elements.
#pragma once

#include <cstdint>

namespace mla::cuda {

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
