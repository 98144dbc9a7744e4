// Products with f32 weights, in f32: routers are such, and small models.
#include "cuda/launch.cuh"
#include "cuda/product.h"

#include <cuda_bf16.h>

namespace mla::cuda {
namespace {

constexpr int warps = 8;

__device__ const float* row_of(const Product& p, int head, int i) {
  return static_cast<const float*>(p.x.data) + (p.x.index ? p.x.index[i] : i) * p.x.row + head * p.x.head;
}

__device__ void put(const Part& part, int head, int i, int row, float y) {
  const Results& to = part.y;
  const int64_t at = i * to.row + head * to.head + row;
  if (to.bf16) {
    static_cast<__nv_bfloat16*>(to.data)[at] = __float2bfloat16(y);
    return;
  }
  float* out = static_cast<float*>(to.data) + at;
  if (to.bias) y += to.bias[row];
  *out = to.add ? *out + y : y;
}

__device__ bool find_run(const Product& p, int index, Run& run) {
  run = {p.choice ? p.choice[index] : index, 0, p.n};
  if (!p.runs) return true;
  if (index >= *p.run_count) return false;
  run = p.runs[index];
  return true;
}

__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// Four columns of a row, zeros past the end.
__device__ float4 four(const float* row, int column, int cols, bool aligned) {
  if (aligned && column + 4 <= cols) return *reinterpret_cast<const float4*>(row + column);
  float4 x{};
  if (column < cols) x.x = row[column];
  if (column + 1 < cols) x.y = row[column + 1];
  if (column + 2 < cols) x.z = row[column + 2];
  if (column + 3 < cols) x.w = row[column + 3];
  return x;
}

// Few rows of activations: a warp has a row of weights.
__global__ void __launch_bounds__(32 * warps) f32_few_kernel(const __grid_constant__ Product p, int part_index) {
  begin_kernel();
  const Part& part = p.part[part_index];
  const int row = int(blockIdx.x) * warps + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, cols = part.w.cols;
  Run run;
  if (!find_run(p, int(blockIdx.y), run) || row >= part.w.rows) return;
  const int head = p.runs ? 0 : int(blockIdx.y);
  const auto* w = reinterpret_cast<const float*>(part.w.codes(run.matrix, row));
  for (int first = 0; first < run.count; first += few_rows) {
    const int count = min(few_rows, run.count - first);
    const float* x[few_rows];
    bool aligned = true;
#pragma unroll
    for (int t = 0; t < few_rows; ++t) {
      x[t] = row_of(p, head, run.first + first + min(t, count - 1));
      aligned = aligned && reinterpret_cast<uintptr_t>(x[t]) % 16 == 0;
    }
    float sum[few_rows] = {};
#pragma unroll 4
    for (int i = lane * 4; i < cols; i += 128) {
      const float4 a = four(w, i, cols, true);
#pragma unroll
      for (int t = 0; t < few_rows; ++t) {
        if (t >= count) break;
        sum[t] += dot(a, four(x[t], i, cols, aligned));
      }
    }
#pragma unroll
    for (int t = 0; t < few_rows; ++t) {
      if (t >= count) break;
      for (int step = 16; step > 0; step /= 2) sum[t] += __shfl_xor_sync(~0u, sum[t], step);
      if (lane == t) put(part, head, run.first + first + t, row, sum[t]);
    }
  }
}

// Many: a block has 64 rows of weights × 32 of activations, a thread 4 × 2, and goes through the columns 32 at a time, the next ones on
// their way.
constexpr int tile_weights = 64, tile_rows = 32, tile_columns = 32;

__global__ void __launch_bounds__(256) f32_tiles_kernel(const __grid_constant__ Product p, int part_index) {
  begin_kernel();
  __shared__ float a[tile_columns][tile_weights + 4], b[tile_columns][tile_rows + 4];
  const Part& part = p.part[part_index];
  Run run;
  const int first = int(blockIdx.z) * tile_rows, row = int(blockIdx.x) * tile_weights, cols = part.w.cols, thread = int(threadIdx.x);
  if (!find_run(p, int(blockIdx.y), run) || first >= run.count) return;
  const int head = p.runs ? 0 : int(blockIdx.y);
  // A thread brings 4 columns of two rows of weights and of one of activations.
  const int r = thread / 8, c = thread % 8 * 4;
  const float* w[2];
  for (int i = 0; i < 2; ++i) w[i] = reinterpret_cast<const float*>(part.w.codes(run.matrix, min(row + r + 32 * i, part.w.rows - 1)));
  const float* x = row_of(p, head, run.first + min(first + r, run.count - 1));
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  float4 next_w[2], next_x;
  auto fetch = [&](int k) {
    next_w[0] = four(w[0], k + c, cols, true), next_w[1] = four(w[1], k + c, cols, true);
    next_x = four(x, k + c, cols, aligned);
  };
  auto spread = [&](float* to, int pitch, const float4& v) { to[0] = v.x, to[pitch] = v.y, to[2 * pitch] = v.z, to[3 * pitch] = v.w; };
  const int wide = thread % 16 * 4, tall = thread / 16 * 2;
  float sum[4][2] = {};
  fetch(0);
  for (int k = 0; k < cols; k += tile_columns) {
    spread(&a[c][r], tile_weights + 4, next_w[0]);
    spread(&a[c][r + 32], tile_weights + 4, next_w[1]);
    spread(&b[c][r], tile_rows + 4, next_x);
    __syncthreads();
    if (k + tile_columns < cols) fetch(k + tile_columns);
#pragma unroll
    for (int j = 0; j < tile_columns; ++j) {
      const float4 u = *reinterpret_cast<const float4*>(&a[j][wide]);
      const float2 v = *reinterpret_cast<const float2*>(&b[j][tall]);
      sum[0][0] += u.x * v.x, sum[1][0] += u.y * v.x, sum[2][0] += u.z * v.x, sum[3][0] += u.w * v.x;
      sum[0][1] += u.x * v.y, sum[1][1] += u.y * v.y, sum[2][1] += u.z * v.y, sum[3][1] += u.w * v.y;
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int t = 0; t < 2; ++t)
      if (row + wide + i < part.w.rows && first + tall + t < run.count)
        put(part, head, run.first + first + tall + t, row + wide + i, sum[i][t]);
}

}  // namespace

void product_f32(const Product& p, cudaStream_t stream) {
  require(!p.x.bf16, "f32 products of bf16 activations");
  const auto runs = unsigned(p.runs ? p.most_runs : p.matrices);
  for (int i = 0; i < p.parts; ++i) {
    require(p.part[i].w.type == DType::f32 && !p.part[i].up.data, "these f32 products");
    const int rows = p.part[i].w.rows;
    if (p.most <= few_rows)
      launch(f32_few_kernel, dim3(unsigned(ceil_div(rows, warps)), runs), 32 * warps, 0, stream, p, i);
    else
      launch(f32_tiles_kernel, dim3(unsigned(ceil_div(rows, tile_weights)), runs, unsigned(ceil_div(p.most, tile_rows))), 256, 0, stream, p,
             i);
  }
}

}  // namespace mla::cuda
