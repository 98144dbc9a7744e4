// Products of few rows: blocks go through groups of 16 rows of weights, their warps share the columns, and tensor cores multiply what has
// been loaded with up to 8 rows of activations. Weights go from memory to registers in pieces of 16 bytes a lane, already in the order of
// the instruction's fragments, since the order of a sum's terms is free as long as both sides have the same. A piece's registers are
// loaded again as soon as it has been used, with what the warp will need that many pieces later, so that memory never waits. Other work
// that depends on the same kernel goes in front, as the launch's first blocks.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/product.h"

#include <algorithm>

namespace mla::cuda {

constexpr int gemv_warps = 8, gemv_threads = 32 * gemv_warps, most_gemv_blocks = 264;

// The warps that share the columns of a group. Where columns are few, a block has several teams, each with groups of its own.
template <int Warps>
struct Team {
  static constexpr int warps = Warps, threads = 32 * Warps, teams = gemv_warps / Warps;
  int id = int(threadIdx.x) / threads, thread = int(threadIdx.x) % threads, warp = thread / 32, lane = thread % 32;
  __device__ void sync() const {
    if constexpr (teams == 1)
      __syncthreads();
    else
      named_sync(1 + id, threads);
  }
};
constexpr int few_columns = 128, few_warps = 2;  // up to so many columns teams have so few warps

// Weights past their use are not worth a place in the caches.
__device__ inline uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

// The two rows of weights of a lane's fragments; scales of quantised ones.
struct Source {
  const std::byte *upper, *lower;
  const std::byte *upper_scales, *lower_scales;
};

// What a lane has of 16 rows × `columns` columns: 16 bytes (bf16: twice, so that a row's four lanes have a cache line) of each of its two
// rows, and their scales.
template <DType Type>
struct Piece;

template <>
struct Piece<DType::bf16> {
  static constexpr int columns = 64, depth = 4;
  uint4 upper[2], lower[2];
  __device__ void load(const Source& from, int column, int lane) {
    const int at = column * 2 + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) upper[i] = load_once(from.upper + at + 64 * i), lower[i] = load_once(from.lower + at + 64 * i);
  }
  // x: this lane's row of activations, from the piece's first column on; null for none.
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 b = x ? *reinterpret_cast<const uint4*>(x + 32 * i + lane % 4 * 8) : uint4{};
      multiply_bf16(c, {upper[i].x, lower[i].x, upper[i].y, lower[i].y}, {b.x, b.y});
      multiply_bf16(c, {upper[i].z, lower[i].z, upper[i].w, lower[i].w}, {b.z, b.w});
    }
  }
};

// Products of one scale's 32 columns are summed as whole numbers and scaled once.
__device__ inline void add_scaled(float (&c)[4], const uint32_t (&u)[4], const uint32_t (&l)[4], const uint4& b, float upper, float lower) {
  float t[4] = {};
  multiply_bf16(t, {u[0], l[0], u[1], l[1]}, {b.x, b.y});
  multiply_bf16(t, {u[2], l[2], u[3], l[3]}, {b.z, b.w});
  c[0] += upper * t[0], c[1] += upper * t[1];
  c[2] += lower * t[2], c[3] += lower * t[3];
}

template <>
struct Piece<DType::q8_0> {
  static constexpr int columns = 64, depth = 4;
  uint4 upper, lower;
  uint32_t upper_scale, lower_scale;  // two halves each
  __device__ void load(const Source& from, int column, int lane) {
    const int at = column + lane % 4 * 16;
    upper = load_once(from.upper + at), lower = load_once(from.lower + at);
    upper_scale = *reinterpret_cast<const uint32_t*>(from.upper_scales + column / 16);
    lower_scale = *reinterpret_cast<const uint32_t*>(from.lower_scales + column / 16);
  }
  __device__ static void expand(uint32_t first, uint32_t second, uint32_t (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? first : second;
      const int shift = i % 2 * 16;
      to[i] = bf16_pair(float(int8_t(word >> shift)), float(int8_t(word >> (shift + 8))));
    }
  }
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 b = x ? *reinterpret_cast<const uint4*>(x + i * 32 + lane % 4 * 8) : uint4{};
      uint32_t u[4], l[4];
      expand(i ? upper.z : upper.x, i ? upper.w : upper.y, u);
      expand(i ? lower.z : lower.x, i ? lower.w : lower.y, l);
      add_scaled(c, u, l, b, half_of(upper_scale, i), half_of(lower_scale, i));
    }
  }
};

// Codes are exact in bf16, and one scale is that of all the piece's columns.
template <>
struct Piece<DType::f8> {
  static constexpr int columns = 64, depth = 4;
  uint4 upper, lower;
  float upper_scale, lower_scale;
  __device__ void load(const Source& from, int column, int lane) {
    const int at = column + lane % 4 * 16;
    upper = load_once(from.upper + at), lower = load_once(from.lower + at);
    upper_scale = *reinterpret_cast<const float*>(from.upper_scales + column / 128 * 4);
    lower_scale = *reinterpret_cast<const float*>(from.lower_scales + column / 128 * 4);
  }
  __device__ void add_to(float (&c)[4], const __nv_bfloat16* x, int lane) const {
    const uint32_t up[4] = {upper.x, upper.y, upper.z, upper.w}, low[4] = {lower.x, lower.y, lower.z, lower.w};
    float t[4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 b = x ? *reinterpret_cast<const uint4*>(x + i * 32 + lane % 4 * 8) : uint4{};
      multiply_bf16(t, {f8_pair(up[2 * i], 0), f8_pair(low[2 * i], 0), f8_pair(up[2 * i], 1), f8_pair(low[2 * i], 1)}, {b.x, b.y});
      multiply_bf16(t, {f8_pair(up[2 * i + 1], 0), f8_pair(low[2 * i + 1], 0), f8_pair(up[2 * i + 1], 1), f8_pair(low[2 * i + 1], 1)},
                    {b.z, b.w});
    }
    c[0] += upper_scale * t[0], c[1] += upper_scale * t[1];
    c[2] += lower_scale * t[2], c[3] += lower_scale * t[3];
  }
};

template <>
struct Piece<DType::q4_0> {
  static constexpr int columns = 128, depth = 2;
  uint4 upper, lower;
  uint2 upper_scale, lower_scale;  // four halves each
  __device__ void load(const Source& from, int column, int lane) {
    const int at = column / 2 + lane % 4 * 16;
    upper = load_once(from.upper + at), lower = load_once(from.lower + at);
    upper_scale = *reinterpret_cast<const uint2*>(from.upper_scales + column / 16);
    lower_scale = *reinterpret_cast<const uint2*>(from.lower_scales + column / 16);
  }
  __device__ static void expand(uint32_t word, uint32_t (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = as_word(nibble_pair(word, i));
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
      add_scaled(c, u, l, b, half_of(us, i % 2), half_of(ls, i % 2));
    }
  }
};

// Rows of activations in shared memory begin 64 bytes apart in the banks, so that the eight rows of a fragment do not collide by more than
// the instruction's own two turns.
__host__ __device__ inline int shared_pitch(int pitch) { return pitch / 64 * 64 + 32 + (pitch % 64 ? 64 : 0); }

// The squares of rows that are to be normed, a warp's share each. Turns take turns, so that nobody overwrites what is still read.
template <class Team>
using Squares = float[few_rows][Team::warps];

// Brings rows of activations to shared memory as bf16, multiplied by a norm's weights where they are to be normed: that they are divided by
// their size can wait for the results. All of the team calls it.
template <class Team>
__device__ void stage(const Team& team, const Product& p, int head, int first, int count, int cols, int pitch, __nv_bfloat16* to,
                      Squares<Team>& squares) {
  constexpr int threads = Team::threads;
  const int wide = shared_pitch(pitch), thread = team.thread;
  auto row = [&](int t) { return (p.x.index ? p.x.index[first + t] : first + t) * p.x.row + head * p.x.head; };
  for (int t = 0; t < count; ++t) {
    if (p.x.bf16) {
      const auto* from = static_cast<const __nv_bfloat16*>(p.x.data) + row(t);
      // Rows of bf16 are results of other products: aligned, but for their ends.
      for (int i = thread * 8; i < pitch; i += 8 * threads) {
        if (i + 8 <= cols) {
          *reinterpret_cast<uint4*>(to + t * wide + i) = *reinterpret_cast<const uint4*>(from + i);
        } else {
          for (int j = i; j < i + 8; ++j) to[t * wide + j] = j < cols ? from[j] : __nv_bfloat16();
        }
      }
      continue;
    }
    const float* from = static_cast<const float*>(p.x.data) + row(t);
    float sum = 0;
    for (int i = thread * 4; i < pitch; i += 4 * threads) {
      float4 v = four(from, i, cols);
      if (p.x.norm) {
        const float4 w = four(p.x.norm, i, cols);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        v = {v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w};
      }
      *reinterpret_cast<uint2*>(to + t * wide + i) = {bf16_pair(v.x, v.y), bf16_pair(v.z, v.w)};
    }
    if (!p.x.norm) continue;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (team.lane == 0) squares[t][team.warp] = sum;
  }
}

// What a block's 16 rows of weights are: rows of one matrix; 8 of the gate and the same 8 of the up projection; or, where a token's experts
// are summed, 8 of one expert and the same 8 of the next.
enum class Kind : uint8_t { plain, gated, sum };

__host__ __device__ constexpr int group_rows(Kind kind) { return kind == Kind::plain ? 16 : 8; }

__host__ __device__ inline int groups_of(const Product& p, Kind kind) {
  int groups = 0;
  for (int i = 0; i < p.parts; ++i) groups += p.part[i].w.padded_rows() / group_rows(kind);
  return groups;
}

// Where a block is. It goes through groups of rows of weights, a group's turns and the columns in steps; a turn is 8 rows of activations
// or, in a sum, two experts.
template <Kind K>
struct Place {
  int group, turn, step, turns;
  int stack, part, row;  // matrix h of a product by heads, run h, or the h-th choice; rows of weights from `row` on
  Run run;

  __device__ void enter(const Product& p, int to, int turn_rows) {
    const int each = groups_of(p, K);
    group = to, turn = step = part = 0, stack = to / each, row = to % each;
    while (part + 1 < p.parts && row >= p.part[part].w.padded_rows() / group_rows(K)) row -= p.part[part++].w.padded_rows() / group_rows(K);
    row *= group_rows(K);
    run = p.runs ? p.runs[stack] : Run{p.choice && K != Kind::sum ? p.choice[stack] : stack, 0, p.n};
    turns = K == Kind::sum ? (p.matrices + 1) / 2 : (run.count + turn_rows - 1) / turn_rows;
  }
  // To the step after; whether it is another turn's.
  __device__ bool advance(const Product& p, int steps, int end, int turn_rows) {
    if (++step < steps) return false;
    step = 0;
    if (++turn == turns) {
      if (++group < end) enter(p, group, turn_rows);
    }
    return true;
  }
  __device__ Source source(const Product& p, int lane) const {
    const PackedMatrix& w = p.part[part].w;
    const int first = row + lane / 4;
    if constexpr (K == Kind::sum) return of(w, p.choice[2 * turn], first, w, p.choice[min(2 * turn + 1, p.matrices - 1)], first);
    if constexpr (K == Kind::gated) return of(w, run.matrix, first, p.part[part].up, run.matrix, first);
    return of(w, run.matrix, first, w, run.matrix, first + 8);
  }

 private:
  __device__ static Source of(const PackedMatrix& w, int64_t matrix, int row, const PackedMatrix& v, int64_t other, int lower) {
    return {w.codes(matrix, row), v.codes(other, lower), w.scales(matrix, row), v.scales(other, lower)};
  }
};

// Asks for a vector that all blocks are about to read; all of the block calls it.
__device__ inline void prefetch_floats(const float* from, int count) {
  for (int i = int(threadIdx.x) * 32; i < count; i += gemv_threads * 32) prefetch_l2(from + i);
}

// A team's sums of groups that take turns.
template <class Team>
using Sums = float[2][Team::warps][16][few_rows];

// The warps' sums become results.
template <Kind K, class Team>
__device__ void finish(const Team& team, const Rows& x, const Part& part, int head, int first, int count, int row,
                       const float (&sums)[Team::warps][16][few_rows], const Squares<Team>& squares) {
  constexpr int rows = group_rows(K);
  for (int i = team.thread; i < rows * count; i += Team::threads) {
    const int r = i % rows, t = i / rows;
    if (row + r >= part.w.rows) continue;
    float y = 0, up = 0;
    for (const auto& of_warp : sums) y += of_warp[r][t];
    if constexpr (K == Kind::gated)
      for (const auto& of_warp : sums) up += of_warp[r + 8][t];
    if (x.norm) {
      float square = 0;
      for (const float of_warp : squares[t]) square += of_warp;
      const float scale = rsqrtf(square / float(part.w.cols) + x.eps);
      y *= scale, up *= scale;
    }
    if constexpr (K == Kind::gated) y = silu(y) * up;
    const Results& to = part.y;
    const int64_t at = (first + t) * to.row + head * to.head + row + r;
    if (to.bf16) {
      static_cast<__nv_bfloat16*>(to.data)[at] = __float2bfloat16(y);
      continue;
    }
    auto* out = static_cast<float*>(to.data) + at;
    if (to.bias) y += to.bias[row + r];
    *out = to.add ? *out + y : y;
  }
}

// What a launch of products has in front: no blocks.
struct Nothing {
  __host__ __device__ int blocks() const { return 0; }
  size_t shared_bytes() const { return 0; }
  __device__ void run(int, uint8_t*, bool) const {}
};

// Such work by itself.
template <class Front>
__global__ void __launch_bounds__(gemv_threads, 2) front_kernel(const __grid_constant__ Front front) {
  extern __shared__ __align__(16) uint8_t memory[];
  front.run(int(blockIdx.x), memory, false);
}

template <class Front>
void launch_front(const Front& front, cudaStream_t stream) {
  launch(front_kernel<Front>, unsigned(front.blocks()), gemv_threads, front.shared_bytes(), stream, front);
}

// turn_rows: of activations that a team's shared memory holds, up to few_rows. weight: of a sum, y += Σ weight[j] · W_choice[j] x[j].
template <DType Type, Kind K, int Warps, class Front>
__global__ void __launch_bounds__(gemv_threads, 2)
    gemv_kernel(const __grid_constant__ Product p, int turn_rows, const float* weight, const __grid_constant__ Front front) {
  using P = Piece<Type>;
  extern __shared__ __align__(16) uint8_t memory[];
  if (int(blockIdx.x) < front.blocks()) return front.run(int(blockIdx.x), memory, p.next_at_once);
  const Team<Warps> team;
  using S = Sums<Team<Warps>>;
  S& sums = reinterpret_cast<S*>(memory)[team.id];
  __shared__ Squares<Team<Warps>> squares[team.teams][2];
  const int warp = team.warp, lane = team.lane, pitch = p.part[0].w.pitch, wide = shared_pitch(pitch),
            steps = (pitch + P::depth * Warps * P::columns - 1) / (P::depth * Warps * P::columns);
  auto* x = reinterpret_cast<__nv_bfloat16*>(memory + sizeof(S) * team.teams) + team.id * turn_rows * wide;
  // Weights are on their way before the activations are there, unless it is not known yet which they are.
  const bool early = !p.runs && (!p.choice || p.choice_is_old);
  if (!early) begin_kernel();
  const int groups = groups_of(p, K) * (K == Kind::sum ? 1 : p.runs ? *p.run_count : p.matrices);
  const int teams = (int(gridDim.x) - front.blocks()) * team.teams, number = (int(blockIdx.x) - front.blocks()) * team.teams + team.id;
  const int begin = int(int64_t(groups) * number / teams), end = int(int64_t(groups) * (number + 1) / teams);
  if (begin == end) return;
  auto column = [&](int step, int i) { return ((step * P::depth + i) * Warps + warp) * P::columns; };
  P piece[P::depth];
  Place<K> at, ahead;
  at.enter(p, begin, turn_rows);
  ahead = at;
  Source source = ahead.source(p, lane);
#pragma unroll
  for (int i = 0; i < P::depth; ++i)
    if (column(0, i) < pitch) piece[i].load(source, column(0, i), lane);
  if (ahead.advance(p, steps, end, turn_rows) && ahead.group < end) source = ahead.source(p, lane);
  if (early) {
    if (p.x.norm) prefetch_floats(p.x.norm, p.part[0].w.cols);
    begin_kernel(p.next_at_once);
  }
  if constexpr (K == Kind::sum) {
    for (int j = 0; j < p.matrices; ++j) stage(team, p, j, 0, 1, p.part[0].w.cols, pitch, x + j * wide, squares[team.id][0]);
    team.sync();
  }
  float c[4] = {}, total = 0;
  int buffer = 0, staged = 0, staged_stack = -1, staged_turn = -1;
  while (at.group < end) {
    const int first = K == Kind::sum ? 0 : at.turn * turn_rows, count = K == Kind::sum ? 1 : min(turn_rows, at.run.count - first);
    const __nv_bfloat16* own = nullptr;
    if constexpr (K == Kind::sum) {
      if (lane / 4 < 2 && 2 * at.turn + lane / 4 < p.matrices) own = x + (2 * at.turn + lane / 4) * wide;
    } else {
      const int stack = p.runs || p.x.head ? at.stack : 0;
      if (stack != staged_stack || at.turn != staged_turn) {
        staged ^= 1;
        stage(team, p, p.runs ? 0 : at.stack, at.run.first + first, count, p.part[0].w.cols, pitch, x, squares[team.id][staged]);
        team.sync();
        staged_stack = stack, staged_turn = at.turn;
      }
      if (lane / 4 < count) own = x + lane / 4 * wide;
    }
    const bool more = ahead.group < end;
#pragma unroll
    for (int i = 0; i < P::depth; ++i) {
      const int now = column(at.step, i), later = column(ahead.step, i);
      if (now < pitch) piece[i].add_to(c, own ? own + now : nullptr, lane);
      if (more && later < pitch) piece[i].load(source, later, lane);
    }
    if (more && ahead.advance(p, steps, end, turn_rows) && ahead.group < end) source = ahead.source(p, lane);
    const Place<K> was = at;
    if (!at.advance(p, steps, end, turn_rows)) continue;
    if constexpr (K == Kind::sum) {
      // A quarter's first lane has a row's sums: of the one expert in column 0 of the upper rows, of the other in column 1 of the lower.
      total += weight[2 * was.turn] * c[0];
      if (2 * was.turn + 1 < p.matrices) total += weight[2 * was.turn + 1] * c[3];
      c[0] = c[1] = c[2] = c[3] = 0;
      if (at.group == was.group) continue;
      if (lane % 4 == 0) sums[buffer][warp][lane / 4][0] = total;
      total = 0;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[buffer][warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = c[i], c[i] = 0;
    }
    team.sync();
    finish<K>(team, p.x, p.part[was.part], p.runs || K == Kind::sum ? 0 : was.stack, was.run.first + first, count, was.row, sums[buffer],
              squares[team.id][staged]);
    buffer ^= 1;
  }
}

template <DType Type, Kind K, int Warps, class Front>
void launch_gemv_as(const Product& p, const float* weight, const Front& front, cudaStream_t stream) {
  require(!p.x.code_order, "products of few rows with activations in the codes' order");
  int pitch = 0;
  for (int i = 0; i < p.parts; ++i) pitch = std::max(pitch, p.part[i].w.pitch);
  constexpr int teams = Team<Warps>::teams;
  const int groups = groups_of(p, K) * (K == Kind::sum ? 1 : p.runs ? p.most_runs : p.matrices);
  const size_t row_bytes = size_t(shared_pitch(pitch)) * 2;
  constexpr size_t sums = sizeof(Sums<Team<Warps>>) * teams;
  const int turn_rows = std::min({p.most, few_rows, int((most_shared_bytes() - sums) / row_bytes / teams)});
  require(turn_rows > 0, "products of rows this long");
  // What is in front has the memory of the product's blocks. Blocks that took more than those of the launches around them would wait for a
  // multiprocessor to be idle, whose memory has to be divided anew.
  const size_t shared = std::max(sums + size_t(K == Kind::sum ? p.matrices : turn_rows * teams) * row_bytes, front.shared_bytes());
  const int blocks = front.blocks() + std::min(int(ceil_div(groups, teams)), most_gemv_blocks - front.blocks());
  check(cudaFuncSetAttribute(gemv_kernel<Type, K, Warps, Front>, cudaFuncAttributePreferredSharedMemoryCarveout, shared_percent(shared)));
  launch(gemv_kernel<Type, K, Warps, Front>, unsigned(blocks), gemv_threads, shared, stream, p, turn_rows, weight, front);
}

inline bool has_few_columns(const Product& p) { return p.part[0].w.pitch <= few_columns; }

template <Kind K, int Warps, class Front>
void launch_gemv(const Product& p, const float* weight, const Front& front, cudaStream_t stream) {
  switch (p.part[0].w.type) {
    case DType::bf16: return launch_gemv_as<DType::bf16, K, Warps>(p, weight, front, stream);
    case DType::f8: return launch_gemv_as<DType::f8, K, Warps>(p, weight, front, stream);
    case DType::q8_0: return launch_gemv_as<DType::q8_0, K, Warps>(p, weight, front, stream);
    case DType::q4_0: return launch_gemv_as<DType::q4_0, K, Warps>(p, weight, front, stream);
    default: require(false, "products of these weights with few rows");
  }
}

}  // namespace mla::cuda
