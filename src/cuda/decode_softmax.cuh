// The pointwise parts of absorbed decode: masks, the running softmax, where results go, and what the second-level cache keeps.
#pragma once

#include "cuda/decode.h"
#include "cuda/elements.cuh"

namespace mla::cuda {

// Results of pieces of sequences, undivided: what was summed refers to 2^reference. A slab is 16 rows, as a warp holds them: a lane has
// rows r = lane / 4 and r + 8. The pieces of a sequence lie behind one another for each slab and sixteen columns, so that who joins them
// reads one stretch of memory.
struct DecodePartials {
  uint4* o;     // [sequences of slots][slabs, d_v / 16, pieces, 32 lanes], bf16: columns c and c + 1, c + 8 and c + 9 of r, then of r + 8
  float* sums;  // [sequences of slots][slabs, pieces][reference; two shares of the sum][16 rows]
  static constexpr int reference = 0, share = slab_rows, sums_of_piece = 3 * slab_rows;
};

__host__ __device__ constexpr int slabs_of(int rows) { return (rows + slab_rows - 1) / slab_rows; }

__host__ __device__ inline DecodePartials decode_partials(const DecodeCall& call, int d_v) {
  auto* o = static_cast<uint4*>(call.scratch);
  return {o, reinterpret_cast<float*>(o + int64_t(call.plan.slots) * slabs_of(call.plan.most_rows) * (d_v / 16) * 32)};
}
// Where the results of a piece begin; the sequence is an item or a merge of it.
template <class Sequence>
__device__ int64_t partial_at(const DeviceDecodePlan& plan, const Sequence& s, int piece, int slab, int sixteen, int d_v) {
  const int sixteens = d_v / 16;
  return ((int64_t(s.slot) * slabs_of(plan.most_rows) * sixteens) + int64_t(slab * sixteens + sixteen) * s.pieces + piece) * 32;
}
template <class Sequence>
__device__ int64_t partial_sums_at(const DeviceDecodePlan& plan, const Sequence& s, int piece, int slab) {
  return (int64_t(s.slot) * slabs_of(plan.most_rows) + int64_t(slab) * s.pieces + piece) * DecodePartials::sums_of_piece;
}

// Whether the copies of a cache's rows, which no later kernel of the step reads, should be the first to leave the second-level cache: they
// spare what others left there, unless so much comes that it leaves anyway. Then the copies are slower for it. A part takes all to be as
// large as itself. Not where more than two blocks share a tile, which is to stay until the last has it.
__device__ inline bool streams_by(int tiles, int tile_bytes) {
  constexpr int64_t most_bytes = int64_t(240) << 20;  // five times the cache
  return gridDim.x <= 2 && int64_t(tiles) * gridDim.y * tile_bytes <= most_bytes;
}

// Joins the partial results of split sequences.
void merge_decode(const DecodeCall& call, DecodePartials partial, int d_v, cudaStream_t stream);

__device__ inline float2 widen_pair(uint32_t pair) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair)); }

// Of the words of four lanes, lane t gets every lane's word t.
__device__ inline void transpose_quad(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = t & bit;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? x[i] : x[i + bit], bit);
      if (upper)
        x[i] = got;
      else
        x[i + bit] = got;
    }
}

// A thread's two rows, 8 apart, in a block's scores.
struct DecodeRows {
  int limit[2];      // rows of the cache each sees
  int first_column;  // its columns are first_column + 8 i + {0, 1}
  float scale_log2;

  __device__ DecodeRows(const DecodeItem& item, int row, int n_h, int lane, float scale) {
    for (int i = 0; i < 2; ++i) limit[i] = min(item.kv_count, item.limit + (row + 8 * i) / n_h);
    first_column = (lane & 3) * 2;
    scale_log2 = scale * log2_e;
  }
};

__device__ inline float rescale(float from, float to) { return from == to ? 1.0f : fast_exp2(from - to); }

// What sums refer to changes only where a score exceeds it by 2^8: f32 sums and bf16 probabilities are as exact below as at 1.
constexpr float headroom_log2 = 8;

// s, the scores of a tile that begins at cache row `token`, become probabilities p in bf16, as the rows of A in a product. m and l are the
// rows' reference (base 2) and this thread's share of their sums; what was summed before must be multiplied by `factor`.
__device__ inline void softmax(float (&s)[32], const DecodeRows& rows, int token, float (&m)[2], float (&l)[2], float (&factor)[2],
                               uint32_t (&p)[16]) {
  const int last = min(rows.limit[0], rows.limit[1]);
  if (token + 64 > last) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (token + rows.first_column + i / 4 * 8 + (i & 1) >= rows.limit[i >> 1 & 1]) s[i] = -INFINITY;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    top = quad_max(top) * rows.scale_log2;
    const float next = top > m[r] + headroom_log2 ? top : m[r];
    factor[r] = rescale(m[r], next);
    m[r] = next;
    const float base = next == -INFINITY ? 0 : next;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = fast_exp2(fmaf(s[4 * i + 2 * r], rows.scale_log2, -base));
      const float y = fast_exp2(fmaf(s[4 * i + 2 * r + 1], rows.scale_log2, -base));
      sum += x + y;
      p[i / 2 * 4 + (i & 1) * 2 + r] = bf16_pair(x, y);
    }
    l[r] = l[r] * factor[r] + sum;
  }
}

template <int N>
__device__ inline void scale_rows(float (&o)[N], const float (&factor)[2]) {
  if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    o[4 * i] *= factor[0], o[4 * i + 1] *= factor[0];
    o[4 * i + 2] *= factor[1], o[4 * i + 3] *= factor[1];
  }
}

}  // namespace mla::cuda
