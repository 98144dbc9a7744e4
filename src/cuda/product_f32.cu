// Products with f32 weights, in f32: routers are such, and small models.
#include "cuda/elements.cuh"
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

// Many: a block has 64 rows of weights × 32 of activations, a thread 4 × 2. The blocks of a cluster share the columns; each goes through
// its part 128 columns at a time, the next ones on their way to shared memory, and then adds up its share of all blocks' sums.
constexpr int tile_weights = 64, tile_rows = 32, step_columns = 128, tile_threads = 256, tile_pitch = step_columns + 4, most_splits = 8;

struct Tile {
  float w[tile_weights][tile_pitch], x[tile_rows][tile_pitch];
};

// 16 bytes from memory, or zeros where `valid` is not set.
__device__ void copy_four(float* to, const float* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__global__ void __launch_bounds__(tile_threads) f32_tiles_kernel(const __grid_constant__ Product p, int part_index, int splits) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto* tiles = reinterpret_cast<Tile*>(memory);  // two, and over them the sums
  begin_kernel();
  const Part& part = p.part[part_index];
  Run run;
  const int first = int(blockIdx.z) * tile_rows, row = int(blockIdx.x) / splits * tile_weights, rank = int(blockIdx.x) % splits,
            thread = int(threadIdx.x), cols = part.w.cols;
  if (!find_run(p, int(blockIdx.y), run) || first >= run.count) return;
  const int head = p.runs ? 0 : int(blockIdx.y), steps = (cols + step_columns - 1) / step_columns, begin = steps * rank / splits,
            end = steps * (rank + 1) / splits;
  auto fetch = [&](int step) {
    Tile& to = tiles[step % 2];
    const int r = thread / 32, c = thread % 32 * 4, column = step * step_columns + c;
#pragma unroll
    for (int i = 0; i < tile_weights / 8; ++i) {
      const int at = min(row + r + 8 * i, part.w.rows - 1);
      const float* from = reinterpret_cast<const float*>(part.w.codes(run.matrix, at));
      copy_four(&to.w[r + 8 * i][c], from + min(column, part.w.pitch - 4), column < part.w.pitch);
    }
#pragma unroll
    for (int i = 0; i < tile_rows / 8; ++i) {
      const float* from = row_of(p, head, run.first + min(first + r + 8 * i, run.count - 1));
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && column + 4 <= cols)
        copy_four(&to.x[r + 8 * i][c], from + column, true);
      else
        *reinterpret_cast<float4*>(&to.x[r + 8 * i][c]) = four(from, column, cols, false);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const int wide = thread % 16, tall = thread / 16 * 2;
  float sum[4][2] = {};
  if (begin < end) fetch(begin);
  for (int step = begin; step < end; ++step) {
    if (step + 1 < end) {
      fetch(step + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    const Tile& t = tiles[step % 2];
#pragma unroll 4
    for (int k = 0; k < step_columns; k += 4) {
      float4 x[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) x[j] = *reinterpret_cast<const float4*>(&t.x[tall + j][k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 w = *reinterpret_cast<const float4*>(&t.w[wide + 16 * i][k]);
#pragma unroll
        for (int j = 0; j < 2; ++j) sum[i][j] += dot(w, x[j]);
      }
    }
    __syncthreads();
  }
  auto* sums = reinterpret_cast<float4*>(memory) + thread;  // [2][threads]
  if (splits > 1) {
#pragma unroll
    for (int j = 0; j < 2; ++j) sums[j * tile_threads] = {sum[0][j], sum[1][j], sum[2][j], sum[3][j]};
    cluster_sync();
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (splits > 1 && (tall + j) % splits != rank) continue;
    float y[4] = {sum[0][j], sum[1][j], sum[2][j], sum[3][j]};
    if (splits > 1) {
      const float4 all = cluster_sum(shared_address(sums + j * tile_threads), splits);
      y[0] = all.x, y[1] = all.y, y[2] = all.z, y[3] = all.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + wide + 16 * i < part.w.rows && first + tall + j < run.count)
        put(part, head, run.first + first + tall + j, row + wide + 16 * i, y[i]);
  }
  if (splits > 1) cluster_sync();  // nobody goes while others read
}

}  // namespace

void product_f32(const Product& p, cudaStream_t stream) {
  require(!p.x.bf16, "f32 products of bf16 activations");
  const auto runs = unsigned(p.runs ? p.most_runs : p.matrices);
  for (int i = 0; i < p.parts; ++i) {
    require(p.part[i].w.type == DType::f32 && !p.part[i].up.data, "these f32 products");
    const int rows = p.part[i].w.rows;
    if (p.most <= few_rows) {
      launch(f32_few_kernel, dim3(unsigned(ceil_div(rows, warps)), runs), 32 * warps, 0, stream, p, i);
      continue;
    }
    // Clusters are of one size for any number of rows, so that sums run in one order.
    int splits = 1;
    while (hopper() && splits < most_splits && p.part[i].w.cols >= splits * 2 * step_columns) splits *= 2;
    launch_clusters(splits, f32_tiles_kernel,
                    dim3(unsigned(ceil_div(rows, tile_weights) * splits), runs, unsigned(ceil_div(p.most, tile_rows))), tile_threads,
                    2 * sizeof(Tile), stream, p, i, splits);
  }
}

}  // namespace mla::cuda
