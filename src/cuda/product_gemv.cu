// Products of few rows: a block takes 16 rows of weights, its warps share the columns, and tensor cores multiply what has been loaded with
// up to 8 rows of activations. Weights go from memory to registers in pieces of 16 bytes a lane, already in the order of the instruction's
// fragments, since the order of a sum's terms is free as long as both sides have the same.
#include "cuda/launch.cuh"
#include "cuda/product.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int warps = 8, threads = 32 * warps, block_rows = 16;

// c += A B for 16 rows, 8 columns and 16 terms: lane l has rows l / 4 and l / 4 + 8 of A, column l / 4 of B, columns 2 (l % 4) + {0, 1} of
// c.
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ uint32_t as_word(__nv_bfloat162 x) { return *reinterpret_cast<uint32_t*>(&x); }

// Weights past their use are not worth a place in the caches.
__device__ uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

// What a lane has of 16 rows × `columns` columns: 16 bytes of each of its two rows, and their scales.
template <DType Type>
struct Piece;

template <>
struct Piece<DType::bf16> {
  static constexpr int columns = 32, depth = 8;
  uint4 upper, lower;
  __device__ void load(const PackedMatrix& w, int64_t matrix, int row, int column, int lane) {
    const int64_t at = int64_t(column) * 2 + lane % 4 * 16;
    upper = load_once(w.codes(matrix, row) + at);
    lower = load_once(w.codes(matrix, row + 8) + at);
  }
  // x: this lane's row of activations, from the piece's first column on; null for none.
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
    const uint4 b = x ? *reinterpret_cast<const uint4*>(x + lane % 4 * 8) : uint4{};
    multiply(c, upper.x, lower.x, upper.y, lower.y, b.x, b.y);
    multiply(c, upper.z, lower.z, upper.w, lower.w, b.z, b.w);
  }
};

__device__ float half_bits(uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

// Products of one scale's 32 columns are summed as whole numbers and scaled once.
__device__ void add_scaled(float (&c)[4], const uint32_t (&u)[4], const uint32_t (&l)[4], const uint4& b, float upper, float lower) {
  float t[4] = {};
  multiply(t, u[0], l[0], u[1], l[1], b.x, b.y);
  multiply(t, u[2], l[2], u[3], l[3], b.z, b.w);
  c[0] += upper * t[0], c[1] += upper * t[1];
  c[2] += lower * t[2], c[3] += lower * t[3];
}

template <>
struct Piece<DType::q8_0> {
  static constexpr int columns = 64, depth = 4;
  uint4 upper, lower;
  uint32_t upper_scale, lower_scale;  // two halves each
  __device__ void load(const PackedMatrix& w, int64_t matrix, int row, int column, int lane) {
    const int64_t at = column + lane % 4 * 16;
    upper = load_once(w.codes(matrix, row) + at);
    lower = load_once(w.codes(matrix, row + 8) + at);
    upper_scale = *reinterpret_cast<const uint32_t*>(w.scales(matrix, row) + column / 32);
    lower_scale = *reinterpret_cast<const uint32_t*>(w.scales(matrix, row + 8) + column / 32);
  }
  __device__ static void expand(uint32_t first, uint32_t second, uint32_t (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? first : second;
      const int shift = i % 2 * 16;
      to[i] = as_word(__floats2bfloat162_rn(float(int8_t(word >> shift)), float(int8_t(word >> (shift + 8)))));
    }
  }
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 b = x ? *reinterpret_cast<const uint4*>(x + i * 32 + lane % 4 * 8) : uint4{};
      uint32_t u[4], l[4];
      expand(i ? upper.z : upper.x, i ? upper.w : upper.y, u);
      expand(i ? lower.z : lower.x, i ? lower.w : lower.y, l);
      add_scaled(c, u, l, b, half_bits(upper_scale >> (16 * i)), half_bits(lower_scale >> (16 * i)));
    }
  }
};

template <>
struct Piece<DType::q4_0> {
  static constexpr int columns = 128, depth = 2;
  uint4 upper, lower;
  uint2 upper_scale, lower_scale;  // four halves each
  __device__ void load(const PackedMatrix& w, int64_t matrix, int row, int column, int lane) {
    const int64_t at = column / 2 + lane % 4 * 16;
    upper = load_once(w.codes(matrix, row) + at);
    lower = load_once(w.codes(matrix, row + 8) + at);
    upper_scale = *reinterpret_cast<const uint2*>(w.scales(matrix, row) + column / 32);
    lower_scale = *reinterpret_cast<const uint2*>(w.scales(matrix, row + 8) + column / 32);
  }
  // Nibbles become the low bits of 128 + nibble in bf16; less 136, that is the code.
  __device__ static void expand(uint32_t word, uint32_t (&to)[4]) {
    const __nv_bfloat162 zero = __floats2bfloat162_rn(136, 136);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair = (word >> (4 * i) & 0x000f000fu) | 0x43004300u;
      to[i] = as_word(__hsub2(*reinterpret_cast<__nv_bfloat162*>(&pair), zero));
    }
  }
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
    const uint32_t up[4] = {upper.x, upper.y, upper.z, upper.w}, low[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 b = x ? *reinterpret_cast<const uint4*>(x + i * 32 + lane % 4 * 8) : uint4{};
      uint32_t u[4], l[4];
      expand(up[i], u);
      expand(low[i], l);
      const uint32_t us = i < 2 ? upper_scale.x : upper_scale.y, ls = i < 2 ? lower_scale.x : lower_scale.y;
      add_scaled(c, u, l, b, half_bits(us >> (16 * (i % 2))), half_bits(ls >> (16 * (i % 2))));
    }
  }
};

// The first pieces of a warp's share of 16 rows.
template <DType Type, int Depth>
struct Ahead {
  Piece<Type> piece[Depth];
  __device__ void load(const PackedMatrix& w, int64_t matrix, int row, int first, int lane) {
    using P = Piece<Type>;
#pragma unroll
    for (int i = 0; i < Depth; ++i) {
      const int column = (first + i * warps) * P::columns;
      if (column < w.pitch) piece[i].load(w, matrix, row, column, lane);
    }
  }
  __device__ void add_to(float (&c)[4], const PackedMatrix& w, int first, const __nv_bfloat16* x, int lane) const {
    using P = Piece<Type>;
#pragma unroll
    for (int i = 0; i < Depth; ++i) {
      const int column = (first + i * warps) * P::columns;
      if (column < w.pitch) piece[i].add_to(c, x ? x + column : nullptr, lane);
    }
  }
};

// A warp's share of 16 rows × all columns; `ahead` has its first pieces.
template <DType Type, int Depth>
__device__ void sum_rows(float (&c)[4], Ahead<Type, Depth>& ahead, const PackedMatrix& w, int64_t matrix, int row, int warp,
                         const __nv_bfloat16* x, int lane) {
  using P = Piece<Type>;
  constexpr int step = Depth * warps;
  for (int first = warp; first * P::columns < w.pitch; first += step) {
    if (first != warp) ahead.load(w, matrix, row, first, lane);
    ahead.add_to(c, w, first, x, lane);
  }
}

// Rows of activations in shared memory begin 64 bytes apart in the banks, so that the eight rows of a fragment do not collide by more than
// the instruction's own two turns.
__host__ __device__ inline int shared_pitch(int pitch) { return pitch / 64 * 64 + 32 + (pitch % 64 ? 64 : 0); }

__device__ void stage(const Product& p, int head, int first, int count, int cols, int pitch, __nv_bfloat16* to) {
  const int wide = shared_pitch(pitch);
  for (int t = 0; t < count; ++t) {
    const int64_t at = (p.x.index ? p.x.index[first + t] : first + t) * p.x.row + head * p.x.head;
    if (p.x.bf16) {
      const auto* from = static_cast<const __nv_bfloat16*>(p.x.data) + at;
      // Rows of bf16 are results of other products: aligned, but for their ends.
      for (int i = int(threadIdx.x) * 8; i < pitch; i += 8 * threads) {
        if (i + 8 <= cols) {
          *reinterpret_cast<uint4*>(to + t * wide + i) = *reinterpret_cast<const uint4*>(from + i);
        } else {
          for (int j = i; j < i + 8; ++j) to[t * wide + j] = j < cols ? from[j] : __nv_bfloat16();
        }
      }
    } else {
      const float* from = static_cast<const float*>(p.x.data) + at;
      const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
      for (int i = int(threadIdx.x) * 4; i < pitch; i += 4 * threads) {
        float4 v{};
        if (aligned && i + 4 <= cols) {
          v = *reinterpret_cast<const float4*>(from + i);
        } else {
          if (i < cols) v.x = from[i];
          if (i + 1 < cols) v.y = from[i + 1];
          if (i + 2 < cols) v.z = from[i + 2];
          if (i + 3 < cols) v.w = from[i + 3];
        }
        *reinterpret_cast<uint2*>(to + t * wide + i) = {as_word(__floats2bfloat162_rn(v.x, v.y)), as_word(__floats2bfloat162_rn(v.z, v.w))};
      }
    }
  }
}

__device__ float silu(float x) { return x / (1 + __expf(-x)); }

// The warps' sums become results.
__device__ void finish(const Part& part, int head, int first, int count, int row, const float (*sums)[block_rows][8],
                       const float (*ups)[block_rows][8]) {
  const int r = int(threadIdx.x) % block_rows, t = int(threadIdx.x) / block_rows;
  if (t >= count) return;
  float y = 0, up = 0;
  for (int i = 0; i < warps; ++i) y += sums[i][r][t];
  if (ups) {
    for (int i = 0; i < warps; ++i) up += ups[i][r][t];
    y = silu(y) * up;
  }
  const Results& to = part.y;
  const int64_t at = (first + t) * to.row + head * to.head + row + r;
  if (row + r >= part.w.rows) return;
  if (to.bf16) {
    static_cast<__nv_bfloat16*>(to.data)[at] = __float2bfloat16(y);
    return;
  }
  auto* out = static_cast<float*>(to.data) + at;
  if (to.bias) y += to.bias[row + r];
  *out = to.add ? *out + y : y;
}

template <DType Type, bool Gated>
__global__ void __launch_bounds__(threads, 2) gemv_kernel(const __grid_constant__ Product p) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto* x = reinterpret_cast<__nv_bfloat16*>(memory);
  __shared__ float sums[warps][block_rows][8], ups[Gated ? warps : 1][block_rows][8];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int group = int(blockIdx.x), at = 0;
  while (at + 1 < p.parts && group >= p.part[at].w.padded_rows() / block_rows) group -= p.part[at++].w.padded_rows() / block_rows;
  const Part& part = p.part[at];
  const int row = group * block_rows, mine = row + lane / 4;
  Run run{int(blockIdx.y), 0, p.n};
  constexpr int depth = Gated ? Piece<Type>::depth / 2 : Piece<Type>::depth;
  Ahead<Type, depth> ahead, ahead_up;
  // Weights are on their way before the activations are there, unless it is not known yet which they are.
  const bool early = !p.runs && (!p.choice || p.choice_is_old);
  if (!early) begin_kernel();
  if (p.choice) run.matrix = p.choice[blockIdx.y];
  if (p.runs) {
    if (int(blockIdx.y) >= *p.run_count) return;
    run = p.runs[blockIdx.y];
  }
  ahead.load(part.w, run.matrix, mine, warp, lane);
  if (Gated) ahead_up.load(part.up, run.matrix, mine, warp, lane);
  if (early) begin_kernel();
  const int head = p.runs ? 0 : int(blockIdx.y), wide = shared_pitch(part.w.pitch);
  for (int first = 0; first < run.count; first += few_rows) {
    const int count = min(few_rows, run.count - first);
    stage(p, head, run.first + first, count, part.w.cols, part.w.pitch, x);
    __syncthreads();
    const __nv_bfloat16* own = lane / 4 < count ? x + lane / 4 * wide : nullptr;
    if (first > 0) {
      ahead.load(part.w, run.matrix, mine, warp, lane);
      if (Gated) ahead_up.load(part.up, run.matrix, mine, warp, lane);
    }
    float c[4] = {}, u[4] = {};
    sum_rows(c, ahead, part.w, run.matrix, mine, warp, own, lane);
    if (Gated) sum_rows(u, ahead_up, part.up, run.matrix, mine, warp, own, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = c[i];
      if (Gated) ups[warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = u[i];
    }
    __syncthreads();
    if (threadIdx.x < block_rows * few_rows) finish(part, head, run.first + first, count, row, sums, Gated ? ups : nullptr);
    __syncthreads();
  }
}

// One token's sum over its experts, y += Σ weight[j] · W_choice[j] x[j]: a block has 16 rows of all of them.
template <DType Type>
__global__ void __launch_bounds__(threads, 1) sum_kernel(const __grid_constant__ Product p, const float* weight) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto* x = reinterpret_cast<__nv_bfloat16*>(memory);  // [matrices, wide]
  __shared__ float sums[warps][block_rows];
  const PackedMatrix& w = p.part[0].w;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, row = int(blockIdx.x) * block_rows, mine = row + lane / 4;
  Ahead<Type, Piece<Type>::depth> ahead, next;
  if (!p.choice_is_old) wait_previous_kernel();
  ahead.load(w, p.choice[0], mine, warp, lane);
  begin_kernel();
  const int wide = shared_pitch(w.pitch);
  for (int j = 0; j < p.matrices; ++j) stage(p, j, 0, 1, w.cols, w.pitch, x + j * wide);
  __syncthreads();
  float total[4] = {};
  for (int j = 0; j < p.matrices; ++j) {
    const int matrix = p.choice[j];
    if (j + 1 < p.matrices) next.load(w, p.choice[j + 1], mine, warp, lane);
    float c[4] = {};
    sum_rows(c, ahead, w, matrix, mine, warp, lane / 4 == 0 ? x + j * wide : nullptr, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += weight[j] * c[i];
    ahead = next;
  }
  if (lane % 4 == 0) sums[warp][lane / 4] = total[0], sums[warp][lane / 4 + 8] = total[2];
  __syncthreads();
  if (threadIdx.x >= block_rows || row + int(threadIdx.x) >= w.rows) return;
  float* out = static_cast<float*>(p.part[0].y.data) + row + threadIdx.x;
  float y = *out;
  for (int i = 0; i < warps; ++i) y += sums[i][threadIdx.x];
  *out = y;
}

template <DType Type>
void run_sum(const Product& p, const float* weight, cudaStream_t stream) {
  const PackedMatrix& w = p.part[0].w;
  const size_t shared = size_t(p.matrices) * size_t(shared_pitch(w.pitch)) * 2;
  launch(sum_kernel<Type>, unsigned(w.padded_rows() / block_rows), threads, shared, stream, p, weight);
}

template <DType Type>
void run(const Product& p, cudaStream_t stream) {
  int groups = 0, pitch = 0;
  for (int i = 0; i < p.parts; ++i) {
    groups += p.part[i].w.padded_rows() / block_rows;
    pitch = std::max(pitch, p.part[i].w.pitch);
  }
  const size_t shared = size_t(std::min(p.most, few_rows)) * size_t(shared_pitch(pitch)) * 2;
  const dim3 grid(unsigned(groups), unsigned(p.runs ? p.most_runs : p.matrices));
  if (p.part[0].up.data)
    launch(gemv_kernel<Type, true>, grid, threads, shared, stream, p);
  else
    launch(gemv_kernel<Type, false>, grid, threads, shared, stream, p);
}

}  // namespace

void product_gemv(const Product& p, cudaStream_t stream) {
  for (int i = 1; i < p.parts; ++i)
    require(p.part[i].w.type == p.part[0].w.type && p.part[i].w.cols == p.part[0].w.cols, "these products together");
  switch (p.part[0].w.type) {
    case DType::bf16: return run<DType::bf16>(p, stream);
    case DType::q8_0: return run<DType::q8_0>(p, stream);
    case DType::q4_0: return run<DType::q4_0>(p, stream);
    default: require(false, "products of these weights with few rows");
  }
}

bool product_sum_takes(const Product& p) {
  const PackedMatrix& w = p.part[0].w;
  return w.type != DType::f32 && p.x.bf16 && p.choice && size_t(p.matrices) * size_t(shared_pitch(w.pitch)) * 2 <= size_t(200) << 10;
}

void product_sum(const Product& p, const float* weight, cudaStream_t stream) {
  switch (p.part[0].w.type) {
    case DType::bf16: return run_sum<DType::bf16>(p, weight, stream);
    case DType::q8_0: return run_sum<DType::q8_0>(p, weight, stream);
    case DType::q4_0: return run_sum<DType::q4_0>(p, weight, stream);
    default: require(false, "a sum of products of these weights");
  }
}

}  // namespace mla::cuda
