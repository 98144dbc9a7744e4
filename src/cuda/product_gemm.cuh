// Products of many rows by Hopper's matrix units: a block computes 128 rows of weights × Tile rows of activations. A warp loads both
// through the copy engine in steps of 64 columns (Q4_0: 128), several steps ahead; two warpgroups multiply, 64 rows of weights each.
// Weights are the instruction's rows and activations its columns, so that one kernel serves from a few rows to thousands. Codes become bf16
// in registers on their way to the instruction; their scales come to shared memory beside them.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/product.h"
#include "cuda/product_codes.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

#include <cuda_bf16.h>

namespace mla::cuda {

constexpr int weight_rows = 128, gemm_threads = 384;

template <int Tile, bool Gated, DType Type>
struct GemmShape {
  using C = Codes<Type>;
  static constexpr bool codes = Type != DType::bf16;
  static constexpr int columns = C::columns, boxes = columns / 64;  // of a step; of 64 columns of activations
  static constexpr int registers = Tile / 2;                        // of a 64 × Tile sum
  static constexpr int matrices = Gated ? 2 : 1;
  static constexpr int weight_bytes = weight_rows * (codes ? 64 : 128), box_bytes = Tile * 128;
  static constexpr int rows_at = matrices * weight_bytes, step_bytes = rows_at + boxes * box_bytes;
  static constexpr int scale_bytes = C::scale_bytes;  // of a matrix and a step
  // Small tiles leave room for two blocks a multiprocessor, one of which copies while the other begins or ends.
  static constexpr int blocks = Tile * matrices <= 64 ? 2 : 1, room = (blocks == 2 ? 109 : 200) * 1024;
  static constexpr int most_steps = room / (step_bytes + matrices * scale_bytes), steps = most_steps > 8 ? 8 : most_steps;
  static constexpr int scales_at = steps * step_bytes;
  static constexpr int shared_bytes = scales_at + steps * matrices * scale_bytes + 1024;
  static constexpr int scale_lanes = codes ? 32 : 0;  // that bring scales
  static constexpr int readers = codes ? 256 : 2;     // that say that a step has been read: all who read its scales, or one of a warpgroup
  static constexpr int loader_registers = blocks == 2 ? 48 : codes ? 72 : 40, group_registers = blocks == 2 ? 96 : codes ? 216 : 232;
};

extern __shared__ __align__(1024) uint8_t gemm_memory[];

struct GemmMaps {
  CUtensorMap w, up, x;
};

// Which rows of activations a block has: `first` in the list of rows, `count` of them.
__device__ inline bool find_tile(const Product& p, int tile, Run& run) {
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
__device__ inline int place_of(int i) {
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int r = thread / 128 * 64 + thread % 128 / 32 * 16 + lane / 4 + i / 2 % 2 * 8, t = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return t * put_pitch + r;
}

// Rows of results [begin, end) from shared memory to where they go: a row of activations a warp, 128 rows of weights.
__device__ inline void put(const Product& p, const Run& run, int row, int begin, int end) {
  const Part& part = p.part[0];
  const Results& to = part.y;
  const auto* sums = reinterpret_cast<const float*>(gemm_memory);
  const int lane = int(threadIdx.x) % 32, r = row + lane * 4, rows = part.w.rows;
  // With runs, results lie as the activations do; otherwise head by head.
  const int64_t base = p.runs ? run.first * to.row : (run.first - run.matrix * p.n) * to.row + run.matrix * to.head;
  const bool whole = r + 4 <= rows && to.row % 4 == 0 && base % 4 == 0 && reinterpret_cast<uintptr_t>(to.data) % 16 == 0;
  for (int t = begin + int(threadIdx.x) / 32; t < min(end, run.count); t += consumers / 32) {
    alignas(16) float y[4];
    const float* sum = sums + t * put_pitch;
    if (to.code_order) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) *reinterpret_cast<float2*>(y + j) = *reinterpret_cast<const float2*>(sum + code_column(lane * 4 + j));
    } else {
      *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(sum + lane * 4);
    }
    const int64_t at = base + t * to.row + r;
    if (to.bf16) {
      auto* out = static_cast<__nv_bfloat16*>(to.data) + at;
      if (whole) {
        *reinterpret_cast<uint2*>(out) = {bf16_pair(y[0], y[1]), bf16_pair(y[2], y[3])};
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

// The thread that copies weights and activations.
template <class S>
__device__ void load_steps(const GemmMaps& maps, const Run& run, int row, int begin, int steps, bool early, uint64_t* full,
                           uint64_t* empty) {
  constexpr int code_columns = S::codes ? 64 : S::columns;  // that a box of weights has: bytes, or bf16
  auto copy_weights = [&](int i) {
    const int slot = i % S::steps, column = (begin + i) * code_columns;
    uint8_t* to = gemm_memory + slot * S::step_bytes;
    barrier_expect(&full[slot], S::step_bytes);
    copy_box(to, &maps.w, &full[slot], column, row, run.matrix);
    if (S::matrices == 2) copy_box(to + S::weight_bytes, &maps.up, &full[slot], column, row, run.matrix);
  };
  const int ahead = early ? min(steps, S::steps) : 0;
  for (int i = 0; i < ahead; ++i) copy_weights(i);
  if (early) begin_kernel();
  for (int i = 0; i < steps; ++i) {
    const int slot = i % S::steps;
    if (i >= S::steps) barrier_wait(&empty[slot], (i / S::steps - 1) & 1);
    if (i >= ahead) copy_weights(i);
    uint8_t* to = gemm_memory + slot * S::step_bytes + S::rows_at;
    for (int box = 0; box < S::boxes; ++box)
      copy_box(to + box * S::box_bytes, &maps.x, &full[slot], (begin + i) * S::columns + box * 64, run.first, 0);
  }
}

// The warp that copies scales.
template <class S>
__device__ void load_scales(const Product& p, const Run& run, int row, int begin, int steps, uint64_t* full, uint64_t* empty) {
  const int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < steps; ++i) {
    const int slot = i % S::steps;
    if (i >= S::steps) barrier_wait(&empty[slot], (i / S::steps - 1) & 1);
    uint8_t* to = gemm_memory + S::scales_at + slot * S::matrices * S::scale_bytes;
    S::C::copy_scales(p.part[0].w, run.matrix, row, (begin + i) * S::columns, lane, to);
    if (S::matrices == 2) S::C::copy_scales(p.part[0].up, run.matrix, row, (begin + i) * S::columns, lane, to + S::scale_bytes);
    copied_arrive(&full[slot]);
  }
}

// What a warpgroup does with the steps: c += W X, up += U X.
template <class S>
struct GemmGroup {
  int group, lane, row;  // row and row + 8 of the weights are this thread's
  uint64_t *full, *empty;

  __device__ GemmGroup(int group_, uint64_t* full_, uint64_t* empty_)
      : group(group_),
        lane(int(threadIdx.x) % 32),
        row(group * 64 + int(threadIdx.x) % 128 / 32 * 16 + lane / 4),
        full(full_),
        empty(empty_) {}

  __device__ static uint8_t* step(int slot) { return gemm_memory + slot * S::step_bytes; }
  __device__ void free(int slot) const {
    if (S::codes || threadIdx.x % 128 == 0) barrier_arrive(&empty[slot]);
  }

  // bf16 from shared memory.
  template <class Up>
  __device__ void multiply(int steps, float (&c)[S::registers], Up& up) const {
    for (int i = 0; i < steps; ++i) {
      const int slot = i % S::steps;
      barrier_wait(&full[slot], i / S::steps & 1);
      const uint64_t w = wgmma_operand(shared_address(step(slot)) + uint32_t(group * 64 * 128)),
                     x = wgmma_operand(shared_address(step(slot) + S::rows_at));
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<false>(c, wgmma_behind(w, k * 32), wgmma_behind(x, k * 32), i > 0 || k > 0);
        if constexpr (S::matrices == 2)
          wgmma<false>(up, wgmma_behind(w, S::weight_bytes + k * 32), wgmma_behind(x, k * 32), i > 0 || k > 0);
      }
      wgmma_commit();
      // The step before is done with when this one has begun.
      wgmma_wait<1>();
      if (i > 0) free((i - 1) % S::steps);
    }
    wgmma_wait<0>();
  }

  // 64 columns of codes by way of registers, which the product before the last has read.
  __device__ void piece(int slot, int matrix, int box, bool add, float (&c)[S::registers], uint32_t (&a)[16]) const {
    S::C::expand(step(slot) + matrix * S::weight_bytes, gemm_memory + S::scales_at + (slot * S::matrices + matrix) * S::scale_bytes, row,
                 lane % 4, box, a);
    const uint64_t x = wgmma_operand(shared_address(step(slot) + S::rows_at + box * S::box_bytes));
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<false>(c, a + 4 * k, wgmma_behind(x, k * 32), add || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
  }

  // Pieces take turns at two sets of registers: one is filled while the other is multiplied.
  template <class Up>
  __device__ void multiply_codes(int steps, float (&c)[S::registers], Up& up) const {
    uint32_t a[16], b[16];
    for (int i = 0; i < steps; ++i) {
      int slot = i % S::steps;
      barrier_wait(&full[slot], i / S::steps & 1);
      if constexpr (S::matrices == 2) {
#pragma unroll 1
        for (int box = 0; box < S::boxes; ++box) {
          piece(slot, 0, box, i > 0 || box > 0, c, a);
          if (i > 0 && box == 0) free((i - 1) % S::steps);
          piece(slot, 1, box, i > 0 || box > 0, up, b);
        }
        continue;
      }
      piece(slot, 0, 0, i > 0, c, a);
      if (i > 0) free((i - 1) % S::steps);
      if constexpr (S::boxes == 2) {
        piece(slot, 0, 1, true, c, b);
      } else {
        if (++i == steps) break;
        slot = i % S::steps;
        barrier_wait(&full[slot], i / S::steps & 1);
        piece(slot, 0, 0, true, c, b);
        free((i - 1) % S::steps);
      }
    }
    wgmma_wait<0>();
  }
};

template <int Tile, bool Gated, DType Type>
__global__ void __launch_bounds__(gemm_threads, GemmShape<Tile, Gated, Type>::blocks)
    gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ Product p, int splits) {
  using S = GemmShape<Tile, Gated, Type>;
  __shared__ uint64_t full[S::steps], empty[S::steps];
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), row = int(blockIdx.x) / splits * weight_rows,
            rank = int(blockIdx.x) % splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::steps; ++i) barrier_init(&full[i], 1 + S::scale_lanes), barrier_init(&empty[i], S::readers);
    barrier_init_done();
    prefetch_map(&maps.w);
    prefetch_map(&maps.x);
  }
  __syncthreads();
  // Weights are on their way before the activations are there, where it is known which.
  const bool early = !p.runs || p.choice_is_old;
  if (!early) begin_kernel();
  Run run;
  const bool any = find_tile(p, Tile, run);
  if (!any) {
    if (early) begin_kernel();
    return;
  }
  const int all = (p.part[0].w.cols + S::columns - 1) / S::columns, begin = all * rank / splits, steps = all * (rank + 1) / splits - begin;
  if (group == 2) {
    if (S::codes || S::blocks == 1) give_registers<S::loader_registers>();
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
    if (warp == 8 && elect_lane()) load_steps<S>(maps, run, row, begin, steps, early, full, empty);
    if constexpr (S::codes)
      if (warp == 9) load_scales<S>(p, run, row, begin, steps, full, empty);
    if (splits > 1) cluster_sync(), cluster_sync();
    return;
  }
  if (early) begin_kernel();
  if (S::codes || S::blocks == 1) take_registers<S::group_registers>();
  float c[S::registers], up[Gated ? S::registers : 1];
  const GemmGroup<S> g(group, full, empty);
  if constexpr (S::codes)
    g.multiply_codes(steps, c, up);
  else
    g.multiply(steps, c, up);
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
inline int splits_for(int64_t blocks, int cols, int tile, bool runs) {
  int splits = 1;
  while (!runs && splits < 8 && splits * 8 < tile && blocks * splits * 2 <= 132 && cols / 64 >= splits * 4) splits *= 2;
  return splits;
}

template <int Tile, bool Gated, DType Type>
void run_gemm(const Product& p, const GemmInput& in, cudaStream_t stream) {
  using S = GemmShape<Tile, Gated, Type>;
  const PackedMatrix& w = p.part[0].w;
  auto weights = [&](const PackedMatrix& m) {
    if constexpr (S::codes) return codes_map(m.data, m.code_row_bytes(), m.padded_rows(), 1 << 20, m.matrix_bytes, weight_rows);
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
  launch_clusters(splits, gemm_kernel<Tile, Gated, Type>, grid, gemm_threads, S::shared_bytes, stream, maps, p, splits);
}

template <DType Type>
void run_gemm(const Product& p, const GemmInput& in, cudaStream_t stream) {
  const bool gated = p.part[0].up.data != nullptr;
  switch (in.tile) {
    case 16: return gated ? run_gemm<16, true, Type>(p, in, stream) : run_gemm<16, false, Type>(p, in, stream);
    case 32: return gated ? run_gemm<32, true, Type>(p, in, stream) : run_gemm<32, false, Type>(p, in, stream);
    case 64: return gated ? run_gemm<64, true, Type>(p, in, stream) : run_gemm<64, false, Type>(p, in, stream);
    case 128: return gated ? run_gemm<128, true, Type>(p, in, stream) : run_gemm<128, false, Type>(p, in, stream);
    case 256:
      if (!gated) return run_gemm<256, false, Type>(p, in, stream);
      [[fallthrough]];
    default: require(false, "a product in tiles of this size");
  }
}

}  // namespace mla::cuda
