// Products of many rows by Hopper's matrix units: a block computes 128 rows of weights × Tile rows of activations. A warp loads both
// through the copy engine in steps of 64 columns, several steps ahead; two warpgroups multiply, 64 rows of weights each. Weights are the
// instruction's rows and activations its columns, so that one kernel serves from 9 rows to thousands.
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/product.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

#include <cuda_bf16.h>

namespace mla::cuda {
namespace {

constexpr int weight_rows = 128, step_columns = 64, threads = 384;

template <int Tile, bool Gated>
struct GemmShape {
  static constexpr int registers = Tile / 2;  // of a 64 × Tile sum
  static constexpr int weight_bytes = weight_rows * 128, row_bytes = Tile * 128;
  static constexpr int step_bytes = weight_bytes * (Gated ? 2 : 1) + row_bytes;
  // Small tiles leave room for two blocks a multiprocessor, one of which copies while the other begins or ends.
  static constexpr int blocks = Tile * (Gated ? 2 : 1) <= 64 ? 2 : 1, room = (blocks == 2 ? 109 : 200) * 1024;
  static constexpr int steps = room / step_bytes > 8 ? 8 : room / step_bytes;
  static constexpr int shared_bytes = steps * step_bytes + 1024;
};

extern __shared__ __align__(1024) uint8_t gemm_memory[];

struct GemmMaps {
  CUtensorMap w, up, x;
};

// Which rows of activations a block has: `first` in the list of rows, `count` of them.
__device__ bool find_tile(const Product& p, int tile, Run& run) {
  if (p.runs) {
    if (int(blockIdx.y) >= *p.run_count) return false;
    run = p.runs[blockIdx.y];
    return true;
  }
  const int first = int(blockIdx.y) * tile;
  run = {int(blockIdx.z), int(blockIdx.z) * p.n + first, min(tile, p.n - first)};
  return true;
}

constexpr int consumers = 256, put_pitch = weight_rows + 4;  // rows of results in shared memory begin in different banks

// Where element i of a thread's sums belongs among the block's results: [rows of activations][rows of weights].
__device__ int place_of(int i) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int r = thread / 128 * 64 + thread % 128 / 32 * 16 + lane / 4 + i / 2 % 2 * 8, t = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return t * put_pitch + r;
}

// Rows of results [begin, end) from shared memory to where they go: a row of activations a warp, 128 rows of weights.
__device__ void put(const Product& p, const Run& run, int row, int begin, int end) {
  const Part& part = p.part[0];
  const Results& to = part.y;
  const auto* sums = reinterpret_cast<const float*>(gemm_memory);
  const int lane = int(threadIdx.x) % 32, r = row + lane * 4, rows = part.w.rows;
  // With runs, results lie as the activations do; otherwise head by head.
  const int64_t base = p.runs ? run.first * to.row : (run.first - run.matrix * p.n) * to.row + run.matrix * to.head;
  const bool whole = r + 4 <= rows && to.row % 4 == 0 && base % 4 == 0 && reinterpret_cast<uintptr_t>(to.data) % 16 == 0;
  for (int t = begin + int(threadIdx.x) / 32; t < min(end, run.count); t += consumers / 32) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = sums[t * put_pitch + lane * 4 + j];
    const int64_t at = base + t * to.row + r;
    if (to.bf16) {
      auto* out = static_cast<__nv_bfloat16*>(to.data) + at;
      if (whole) {
        const __nv_bfloat162 first = __floats2bfloat162_rn(y[0], y[1]), second = __floats2bfloat162_rn(y[2], y[3]);
        *reinterpret_cast<uint2*>(out) = {*reinterpret_cast<const uint32_t*>(&first), *reinterpret_cast<const uint32_t*>(&second)};
      } else {
        for (int j = 0; j < 4 && r + j < rows; ++j) out[j] = __float2bfloat16(y[j]);
      }
      continue;
    }
    auto* out = static_cast<float*>(to.data) + at;
    for (int j = 0; j < 4 && to.bias && r + j < rows; ++j) y[j] += to.bias[r + j];
    if (whole) {
      float4 sum{y[0], y[1], y[2], y[3]};
      if (to.add) {
        const float4 before = *reinterpret_cast<const float4*>(out);
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
      }
      *reinterpret_cast<float4*>(out) = sum;
    } else {
      for (int j = 0; j < 4 && r + j < rows; ++j) out[j] = to.add ? out[j] + y[j] : y[j];
    }
  }
}

// The blocks of a cluster have summed parts of the columns: each adds up its share of the rows of activations.
template <int Tile, bool Gated>
__device__ void add_split(int rank, int splits, float (&c)[Tile / 2], float (&up)[Gated ? Tile / 2 : 1]) {
  constexpr int fours = Tile / 8;
  auto* sums = reinterpret_cast<float4*>(gemm_memory) + threadIdx.x;  // [fours][consumers], twice if gated
#pragma unroll
  for (int i = 0; i < fours; ++i) {
    sums[i * consumers] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
    if constexpr (Gated) sums[(fours + i) * consumers] = {up[4 * i], up[4 * i + 1], up[4 * i + 2], up[4 * i + 3]};
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < fours; ++i) {
    if (i * splits / fours != rank) continue;
    const float4 sum = cluster_sum(shared_address(sums + i * consumers), splits);
    c[4 * i] = sum.x, c[4 * i + 1] = sum.y, c[4 * i + 2] = sum.z, c[4 * i + 3] = sum.w;
    if constexpr (Gated) {
      const float4 other = cluster_sum(shared_address(sums + (fours + i) * consumers), splits);
      up[4 * i] = other.x, up[4 * i + 1] = other.y, up[4 * i + 2] = other.z, up[4 * i + 3] = other.w;
    }
  }
  cluster_sync();  // nobody goes on while others read
}

template <int Tile, bool Gated>
__global__ void __launch_bounds__(threads, GemmShape<Tile, Gated>::blocks)
    gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ Product p, int splits) {
  using S = GemmShape<Tile, Gated>;
  __shared__ uint64_t full[S::steps], empty[S::steps];
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), row = int(blockIdx.x) / splits * weight_rows,
            rank = int(blockIdx.x) % splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::steps; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 2);
    barrier_init_done();
    prefetch_map(&maps.w);
    prefetch_map(&maps.x);
  }
  __syncthreads();
  // Weights are on their way before the activations are there, where it is known which.
  const bool early = !p.decoded && (!p.runs || p.choice_is_old);
  if (!early) begin_kernel();
  Run run;
  const bool any = find_tile(p, Tile, run);
  if (!any) {
    if (early) begin_kernel();
    return;
  }
  const int all = (p.part[0].w.cols + step_columns - 1) / step_columns, begin = all * rank / splits,
            steps = all * (rank + 1) / splits - begin;
  if (group == 2) {
    if (S::blocks == 1) give_registers<40>();
    if (threadIdx.x == 256) {
      auto copy_weights = [&](int i) {
        const int slot = i % S::steps, column = (begin + i) * step_columns;
        uint8_t* to = gemm_memory + slot * S::step_bytes;
        barrier_expect(&full[slot], S::step_bytes);
        copy_box(to, &maps.w, &full[slot], column, row, run.matrix);
        if (Gated) copy_box(to + S::weight_bytes, &maps.up, &full[slot], column, row, run.matrix);
      };
      const int ahead = early ? min(steps, S::steps) : 0;
      for (int i = 0; i < ahead; ++i) copy_weights(i);
      if (early) begin_kernel();
      for (int i = 0; i < steps; ++i) {
        const int slot = i % S::steps;
        if (i >= S::steps) barrier_wait(&empty[slot], (i / S::steps - 1) & 1);
        if (i >= ahead) copy_weights(i);
        copy_box(gemm_memory + (slot + 1) * S::step_bytes - S::row_bytes, &maps.x, &full[slot], (begin + i) * step_columns, run.first, 0);
      }
    }
    if (splits > 1) cluster_sync(), cluster_sync();
    return;
  }
  if (early) begin_kernel();
  if (S::blocks == 1) take_registers<232>();
  float c[S::registers], up[Gated ? S::registers : 1];
  for (int i = 0; i < steps; ++i) {
    const int slot = i % S::steps;
    barrier_wait(&full[slot], i / S::steps & 1);
    const uint8_t* step = gemm_memory + slot * S::step_bytes;
    const uint64_t w = wgmma_operand(shared_address(step) + uint32_t(group * 64 * 128)),
                   x = wgmma_operand(shared_address(step + S::step_bytes - S::row_bytes));
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<false>(c, wgmma_behind(w, k * 32), wgmma_behind(x, k * 32), i > 0 || k > 0);
      if constexpr (Gated) wgmma<false>(up, wgmma_behind(w, S::weight_bytes + k * 32), wgmma_behind(x, k * 32), i > 0 || k > 0);
    }
    wgmma_commit();
    // The step before is done with when this one has begun.
    wgmma_wait<1>();
    if (i > 0 && threadIdx.x % 128 == 0) barrier_arrive(&empty[(i - 1) % S::steps]);
  }
  wgmma_wait<0>();
  named_sync(1, consumers);  // both warpgroups have read their operands
  if (splits > 1) add_split<Tile, Gated>(rank, splits, c, up);
  auto* sums = reinterpret_cast<float*>(gemm_memory);
#pragma unroll
  for (int i = 0; i < S::registers; ++i) {
    float y = c[i];
    if constexpr (Gated) y = silu(y) * up[i];
    sums[place_of(i)] = y;
  }
  named_sync(1, consumers);
  put(p, run, row, Tile * rank / splits, Tile * (rank + 1) / splits);
}

// Blocks that share the columns of a product which has too few rows to go round.
int splits_for(int64_t blocks, int cols, int tile, bool runs) {
  int splits = 1;
  while (!runs && splits < 8 && splits * 8 < tile && blocks * splits * 2 <= 132 && cols / step_columns >= splits * 4) splits *= 2;
  return splits;
}

template <int Tile, bool Gated>
void run(const Product& p, const GemmInput& in, cudaStream_t stream) {
  using S = GemmShape<Tile, Gated>;
  const PackedMatrix& w = p.part[0].w;
  auto weights = [&](const PackedMatrix& m) {
    return matrix_map(m.data, m.cols, m.padded_rows(), 1 << 20, m.code_row_bytes(), m.matrix_bytes, weight_rows);
  };
  GemmMaps maps;
  maps.w = weights(w);
  maps.up = Gated ? weights(p.part[0].up) : maps.w;
  maps.x = matrix_map(in.x, w.cols, in.total, 1, int64_t(in.pitch) * 2, int64_t(in.pitch) * 2 * in.total, Tile);
  dim3 grid(unsigned(ceil_div(w.rows, weight_rows)), unsigned(p.runs ? p.most_runs : ceil_div(p.n, Tile)),
            unsigned(p.runs ? 1 : p.matrices));
  const int splits = splits_for(int64_t(grid.x) * grid.y * grid.z, w.cols, Tile, p.runs);
  grid.x *= unsigned(splits);
  launch_clusters(splits, gemm_kernel<Tile, Gated>, grid, threads, S::shared_bytes, stream, maps, p, splits);
}

template <bool Gated>
void run(const Product& p, const GemmInput& in, cudaStream_t stream) {
  switch (in.tile) {
    case 32: return run<32, Gated>(p, in, stream);
    case 64: return run<64, Gated>(p, in, stream);
    case 128: return run<128, Gated>(p, in, stream);
    case 256:
      if constexpr (!Gated) return run<256, Gated>(p, in, stream);
      [[fallthrough]];
    default: require(false, "a product in tiles of this size");
  }
}

__global__ void rows_kernel(Rows x, int n, int cols, int pitch, __nv_bfloat16* to) {
  begin_kernel();
  const int i = int(blockIdx.x), head = int(blockIdx.y);
  const float* from = static_cast<const float*>(x.data) + (x.index ? x.index[i] : i) * x.row + head * x.head;
  __nv_bfloat16* out = to + (int64_t(head) * n + i) * pitch;
  for (int c = int(threadIdx.x) * 4; c < pitch; c += int(blockDim.x) * 4) {
    float v[4];
    const bool aligned = c + 4 <= cols && (reinterpret_cast<uintptr_t>(from + c) & 15) == 0;
    if (aligned)
      *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(from + c);
    else
      for (int j = 0; j < 4; ++j) v[j] = c + j < cols ? from[c + j] : 0;
    *reinterpret_cast<__nv_bfloat162*>(out + c) = __floats2bfloat162_rn(v[0], v[1]);
    *reinterpret_cast<__nv_bfloat162*>(out + c + 2) = __floats2bfloat162_rn(v[2], v[3]);
  }
}

}  // namespace

void product_gemm(const Product& p, const GemmInput& in, cudaStream_t stream) {
  require(p.parts == 1 && !p.choice && p.part[0].w.type == DType::bf16, "a product of these weights by the matrix units");
  if (p.part[0].up.data)
    run<true>(p, in, stream);
  else
    run<false>(p, in, stream);
}

void rows_to_bf16(const Rows& x, int n, int heads, int cols, int pitch, void* to, cudaStream_t stream) {
  require(!x.bf16 && pitch % 4 == 0, "this conversion");
  launch(rows_kernel, dim3(unsigned(n), unsigned(heads)), unsigned(pitch >= 1024 ? 256 : 64), 0, stream, x, n, cols, pitch,
         static_cast<__nv_bfloat16*>(to));
}

}  // namespace mla::cuda
