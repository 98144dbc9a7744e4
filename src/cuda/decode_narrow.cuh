// Absorbed decode of sequences with up to 16 (query, head) rows, d_c 512 + d_R 64: eight warps multiply, one loads.
#pragma once

#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"

#include <cuda_fp16.h>

namespace mla::cuda {

constexpr int narrow_rows = 16, narrow_warps = 8, narrow_threads = 32 * (narrow_warps + 1);

// Codes: the cache has f8 codes, which become f16 on their way to the matrix units.
template <bool Codes>
struct NarrowShape {
  static constexpr KvFormat format{KvLayout::mla(512, 64), Codes ? DType::f8 : DType::bf16};
  static constexpr int d_k = 576, d_v = 512, row_bytes = int(format.row_bytes());
  // Where columns 512 to 575 and the scales are in a row of codes.
  static constexpr int kept_offset = int(format.kept_offset()), scale_offset = int(format.scale_offset());
  static constexpr int stage_rows = Codes ? 64 : 32, stages = Codes ? 4 : 5, tile_stages = tile_tokens / stage_rows;
  static constexpr int stage_bytes = stage_rows * row_bytes, box_bytes = stage_rows * 128;
  static constexpr float lift = Codes ? 7 : 0;  // probabilities in f16 are so much larger, base 2, since they meet small scales
};

// What a block keeps in shared memory behind its stages. Neighbouring rows begin 8 or 4 banks apart.
template <bool Codes>
struct NarrowShared {
  float score[4][narrow_rows][tile_tokens + 8];  // the shares of four quarters of the columns
  uint16_t p[narrow_rows][tile_tokens + 8];      // probabilities
  float factor[narrow_rows];
  float sum[2][narrow_rows];  // sequences take turns
  uint64_t full[NarrowShape<Codes>::stages], empty[NarrowShape<Codes>::stages], met;
};

template <bool Codes>
constexpr int narrow_bytes = NarrowShape<Codes>::stages* NarrowShape<Codes>::stage_bytes + int(sizeof(NarrowShared<Codes>));
static_assert(narrow_bytes<false> <= 227 << 10 && narrow_bytes<true> <= 227 << 10);

extern __shared__ __align__(1024) uint8_t narrow_memory[];

template <bool Codes>
__device__ NarrowShared<Codes>& narrow_shared() {
  using S = NarrowShape<Codes>;
  return *reinterpret_cast<NarrowShared<Codes>*>(narrow_memory + S::stages * S::stage_bytes);
}

// A place in the ring of stages, and the parity of its phase.
template <bool Codes>
struct NarrowRing {
  int stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == NarrowShape<Codes>::stages) stage = 0, parity ^= 1;
  }
};

// Four 8 × 8 matrices of 16-bit elements, whose rows' addresses the lanes give, eight a matrix.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_across(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// c += A B for 16 rows, 8 columns and 16 terms: lane l has rows l / 4 and l / 4 + 8 of A, column l / 4 of B, columns 2 (l % 4) + {0, 1}
// of c.
__device__ inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t as_word(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }
__device__ inline uint32_t f16_pair(float x, float y) { return as_word(__floats2half2_rn(x, y)); }
__device__ inline uint32_t scale_f16(uint32_t x, __half2 by) { return as_word(__hmul2(*reinterpret_cast<const __half2*>(&x), by)); }
// Two codes of e4m3 as f16, exactly.
__device__ inline uint32_t codes_f16(uint32_t codes) {
  uint32_t x;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(x) : "h"(uint16_t(codes)));
  return x;
}

// The warp that loads: a stage at a time, as soon as it is free.
template <bool Codes>
struct NarrowLoader {
  using S = NarrowShape<Codes>;
  const CUtensorMap* kv_map;
  const DecodeCall& call;
  int lane, tiles_a_page;
  NarrowRing<Codes> ring{0, 1};  // the parity of the emptiness that is waited for
  uint64_t policy;

  __device__ NarrowLoader(const CUtensorMap* map, const DecodeCall& c, bool first_to_go)
      : kv_map(map),
        call(c),
        lane(int(threadIdx.x) & 31),
        tiles_a_page(c.kv.page_tokens / tile_tokens),
        policy(cache_policy(first_to_go)) {}

  __device__ void stage(int row, int page) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    uint8_t* to = narrow_memory + ring.stage * S::stage_bytes;
    uint64_t* full = &shared.full[ring.stage];
    barrier_wait(&shared.empty[ring.stage], ring.parity);
    if (elect_lane()) {
      barrier_expect(full, S::stage_bytes);
      if constexpr (Codes)
        copy_bytes(to, call.kv.base + page * call.kv.page_bytes + row * S::row_bytes, S::stage_bytes, full, policy);
      else
        for (int box = 0; box < S::d_k / 64; ++box) copy_box(to + box * S::box_bytes, kv_map, full, box * 64, row, page, policy);
    }
    __syncwarp();
    ring.next();
  }

  // `first_page`: a part's first item has its first pages here, one a lane.
  __device__ void tiles(const DecodeItem& item, bool has_first, int first_page) {
    int pages = 0;
    for (int t = item.tile_begin; t < item.tile_end; ++t) {
      const int at = (t - item.tile_begin) & 31;
      if (at == 0) pages = t + lane < item.tile_end ? call.plan.pages[item.table + (t + lane) / tiles_a_page] : 0;
      const bool early = has_first && t - item.tile_begin < DecodePart::first_tiles;
      const int page = __shfl_sync(~0u, early ? first_page : pages, at);
      for (int i = 0; i < S::tile_stages; ++i) stage(t % tiles_a_page * tile_tokens + i * S::stage_rows, page);
    }
  }
};

// One of the warps that multiply. It scores half of a tile's tokens over a quarter of the columns, has the softmax of two rows, and a
// 64-column slice of the output.
template <bool Codes>
struct NarrowWarp {
  using S = NarrowShape<Codes>;
  static constexpr int steps = 9;  // of 16 terms, a quarter: 8 of the latent's columns, one of the rotary's
  int warp, lane, g, t;            // lane = 4 g + t
  int half, quarter, met_parity = 0;
  NarrowRing<Codes> ring;
  uint32_t q[steps][4];
  float q_unit[2];   // what queries in f16 were divided by, rows g and g + 8
  float o[8][4];     // columns 8 i + 2 t + {0, 1} of rows g and g + 8; of codes, as `place_columns` says
  float unit, m, l;  // what probabilities of codes were divided by; the softmax's row: reference (base 2), this lane's share of the sum

  __device__ NarrowWarp() {
    warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) & 31, g = lane / 4, t = lane & 3;
    half = warp & 1, quarter = warp / 2;
  }

  __device__ void sync() {
    barrier_arrive(&narrow_shared<Codes>().met);
    barrier_wait(&narrow_shared<Codes>().met, met_parity);
    met_parity ^= 1;
  }
  __device__ int softmax_row() const { return 2 * warp + lane / 16; }

  // Rows past the item's last repeat it.
  __device__ void begin(const DecodeCall& call, const DecodeItem& item) {
    const auto* from = static_cast<const __nv_bfloat16*>(call.q) + int64_t(item.start) * call.n_h * S::d_k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __nv_bfloat16* row = from + max(0, min(g + 8 * i, item.rows - 1)) * S::d_k;
      if constexpr (Codes)
        load_query_f16(row, i);
      else
        load_query(row, i);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
    unit = 0, m = -INFINITY, l = 0;
  }
  __device__ void load_query(const __nv_bfloat16* row, int i) {
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      const int column = (j < 8 ? quarter * 128 + j * 16 : S::d_v + quarter * 16) + 2 * t;
      q[j][i] = *reinterpret_cast<const uint32_t*>(row + column);
      q[j][2 + i] = *reinterpret_cast<const uint32_t*>(row + column + 8);
    }
  }
  // The order of a sum's terms is free: lane t has 32 neighbouring columns of its quarter, four a step.
  __device__ void load_query_f16(const __nv_bfloat16* row, int i) {
    const auto* from = reinterpret_cast<const uint4*>(row + quarter * 128 + 32 * t);
    float2 x[16];
    float most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 four = from[j];
      const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 y = x[4 * j + k] = widen_pair(word[k]);
        most = fmaxf(most, fmaxf(fabsf(y.x), fabsf(y.y)));
      }
    }
    // A power of two that brings the largest to between 2^14 and 2^15.
    const int exponent = max(__float_as_int(quad_max(most)) >> 23, 15);
    const float by = __int_as_float((268 - exponent) << 23);
    q_unit[i] = __int_as_float((exponent - 14) << 23);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 2; ++k) q[j][2 * k + i] = f16_pair(x[2 * j + k].x * by, x[2 * j + k].y * by);
    const uint2 rotary = *reinterpret_cast<const uint2*>(row + S::d_v + quarter * 16 + 4 * t);
    q[8][i] = rotary.x, q[8][2 + i] = rotary.y;
  }

  // Where the stage with half `h` of the tile's tokens begins.
  __device__ static const uint8_t* stage_at(int stage) { return narrow_memory + stage * S::stage_bytes; }

  __device__ void store_scores(const float (&s)[4][4]) const {
    auto& score = narrow_shared<Codes>().score[quarter];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) *reinterpret_cast<float2*>(&score[g + 8 * r][32 * half + 8 * i + 2 * t]) = {s[i][2 * r], s[i][2 * r + 1]};
  }

  __device__ void scores(const uint8_t* stage) const requires(!Codes) {
    float s[4][4] = {};
    const uint32_t from = shared_address(stage) + (lane & 7) * 128 + ((lane / 8 ^ (lane & 7)) & 7) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j)  // 32 columns each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t x[4];
        load_matrices(x, (from + (quarter * 2 + j / 2) * S::box_bytes + i * 1024) ^ (j % 2 * 64));
        multiply_bf16(s[i], q[2 * j], x[0], x[1]);
        multiply_bf16(s[i], q[2 * j + 1], x[2], x[3]);
      }
    const uint32_t rotary =
        shared_address(stage) + 8 * S::box_bytes + (lane / 16 * 8 + (lane & 7)) * 128 + (((quarter * 2 + (lane / 8 & 1)) ^ lane) & 7) * 16;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t x[4];
      load_matrices(x, rotary + i * 1024);
      multiply_bf16(s[i], q[8], x[0], x[1]);
      multiply_bf16(s[i + 1], q[8], x[2], x[3]);
    }
    store_scores(s);
  }
  __device__ void scores(const uint8_t* stage) const requires(Codes) {
    float s[4][4] = {};
    const uint8_t* rows = stage + 32 * half * S::row_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = rows + (8 * i + g) * S::row_bytes;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 x = *reinterpret_cast<const uint4*>(row + quarter * 128 + 32 * t + 16 * j);
        const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_f16(s[i], q[4 * j + k], codes_f16(word[k]), codes_f16(word[k] >> 16));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* column = rows + (8 * i + 2 * t) * S::row_bytes + S::scale_offset + quarter * 4;
      const float x = *reinterpret_cast<const float*>(column), y = *reinterpret_cast<const float*>(column + S::row_bytes);
      s[i][0] *= x * q_unit[0], s[i][1] *= y * q_unit[0], s[i][2] *= x * q_unit[1], s[i][3] *= y * q_unit[1];
      const uint2 rotary = *reinterpret_cast<const uint2*>(rows + (8 * i + g) * S::row_bytes + S::kept_offset + (quarter * 16 + 4 * t) * 2);
      multiply_bf16(s[i], q[8], rotary.x, rotary.y);
    }
    store_scores(s);
  }

  // Two rows a warp, four tokens a lane; `limit`: how many rows of the cache this lane's row sees.
  __device__ void softmax(int token, int limit, float scale_log2) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    const int row = softmax_row(), column = lane % 16 * 4;
    float x[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 y = *reinterpret_cast<const float4*>(&shared.score[i][row][column]);
      x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (token + column + i >= limit) x[i] = -INFINITY;
      top = fmaxf(top, x[i]);
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    top *= scale_log2;
    const float next = top > m + headroom_log2 ? top : m, factor = rescale(m, next), base = next == -INFINITY ? 0 : next - S::lift;
    m = next;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[i] = fast_exp2(fmaf(x[i], scale_log2, -base));
    l = l * factor + sum;
    const uint2 p = Codes ? uint2{f16_pair(x[0], x[1]), f16_pair(x[2], x[3])} : uint2{bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3])};
    *reinterpret_cast<uint2*>(&shared.p[row][column]) = p;
    if (lane % 16 == 0) shared.factor[row] = factor;
  }

  __device__ float row_sum() const {
    float sum = l;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }

  __device__ void scale_output(float upper, float lower) {
#pragma unroll
    for (int j = 0; j < 8; ++j) o[j][0] *= upper, o[j][1] *= upper, o[j][2] *= lower, o[j][3] *= lower;
  }
  __device__ void rescale_output() {
    const NarrowShared<Codes>& shared = narrow_shared<Codes>();
    const float upper = shared.factor[g], lower = shared.factor[g + 8];
    if (__any_sync(~0u, upper != 1 || lower != 1)) scale_output(upper, lower);
  }

  __device__ void probabilities(uint32_t (&a)[4], int step) const {
    load_matrices(a, shared_address(&narrow_shared<Codes>().p[lane & 15][step * 16 + lane / 16 * 8]));
  }

  // o += P V over the 32 tokens of a stage.
  __device__ void values(const uint8_t* stage, int h) requires(!Codes) {
    const uint32_t from = shared_address(stage) + warp * S::box_bytes + (lane & 15) * 128 + ((lane / 16 ^ lane) & 7) * 16;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4];
      probabilities(a, 2 * h + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t x[4];
        load_matrices_across(x, (from + k * 2048) ^ (j * 32));
        multiply_bf16(o[2 * j], a, x[0], x[1]);
        multiply_bf16(o[2 * j + 1], a, x[2], x[3]);
      }
    }
  }

  // The same over a stage's 64 tokens of codes. Probabilities take the tokens' scales along, as shares of the largest so far.
  __device__ void values(const uint8_t* stage, int) requires(Codes) {
    const uint8_t* rows = stage + 2 * t * S::row_bytes;
    constexpr int token[4] = {0, 1, 8, 9};
    float scale[4][4], most = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scale[k][i] = *reinterpret_cast<const float*>(rows + (16 * k + token[i]) * S::row_bytes + S::scale_offset + quarter * 4);
        most = fmaxf(most, scale[k][i]);
      }
    most = quad_max(most);
    if (most > unit) {
      const float factor = unit / most;
      unit = most;
#pragma unroll
      for (int j = 0; j < 8; ++j) o[j][0] *= factor, o[j][1] *= factor, o[j][2] *= factor, o[j][3] *= factor;
    }
    const float by = unit > 0 ? 1 / unit : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      probabilities(a, k);
      const __half2 first = __floats2half2_rn(scale[k][0] * by, scale[k][1] * by),
                    second = __floats2half2_rn(scale[k][2] * by, scale[k][3] * by);
      a[0] = scale_f16(a[0], first), a[1] = scale_f16(a[1], first), a[2] = scale_f16(a[2], second), a[3] = scale_f16(a[3], second);
      uint2 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const uint2*>(rows + (16 * k + token[i]) * S::row_bytes + warp * 64 + 8 * g);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // columns j and j + 1 of this lane's eight
        const uint32_t pick = j % 4 == 0 ? 0x5140 : 0x7362;
        const uint32_t b0 = __byte_perm(j < 4 ? x[0].x : x[0].y, j < 4 ? x[1].x : x[1].y, pick),
                       b1 = __byte_perm(j < 4 ? x[2].x : x[2].y, j < 4 ? x[3].x : x[3].y, pick);
        multiply_f16(o[j], a, codes_f16(b0), codes_f16(b1));
        multiply_f16(o[j + 1], a, codes_f16(b0 >> 16), codes_f16(b1 >> 16));
      }
    }
  }

  // Zeroes a tile's rows from `valid` on: what is there is not the sequence's, and 0 × NaN is NaN.
  __device__ void clear(const int (&stage)[2], int valid) {
    if (valid >= tile_tokens) return;
    constexpr int threads = 32 * narrow_warps;
    for (int i = 0; i < S::tile_stages; ++i) {
      const int from = max(0, valid - i * S::stage_rows);
      auto* at = reinterpret_cast<uint4*>(narrow_memory + stage[i] * S::stage_bytes);
      constexpr int box_rows = Codes ? S::row_bytes / 16 : 8, boxes = Codes ? 1 : S::d_k / 64;  // in 16 bytes
      for (int box = 0; box < boxes; ++box)
        for (int j = from * box_rows + int(threadIdx.x); j < S::stage_rows * box_rows; j += threads)
          at[box * S::box_bytes / 16 + j] = uint4{};
    }
    publish_shared();
    sync();
  }

  __device__ void tile(const DecodeItem& item, int tile, int limit, float scale_log2) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    int stage[2] = {ring.stage, ring.stage};
    int parity[2] = {ring.parity, ring.parity};
    ring.next();
    if constexpr (S::tile_stages == 2) stage[1] = ring.stage, parity[1] = ring.parity, ring.next();
    const int token = tile * tile_tokens, valid = item.kv_count - token;
    barrier_wait(&shared.full[stage[0]], parity[0]);
    if (half == 1 || valid < tile_tokens) barrier_wait(&shared.full[stage[1]], parity[1]);
    clear(stage, valid);
    scores(stage_at(half == 0 ? stage[0] : stage[1]));
    sync();
    softmax(token, limit, scale_log2);
    sync();
    rescale_output();
    for (int i = 0; i < S::tile_stages; ++i) {
      if (i == 1) barrier_wait(&shared.full[stage[1]], parity[1]);
      values(stage_at(stage[i]), i);
      barrier_arrive(&shared.empty[stage[i]]);
    }
  }

  // Of codes, o[j] has columns 16 t + j and 16 t + 8 + j: eights of columns change hands.
  __device__ void place_columns() {
    float got[8][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          uint32_t word[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) word[i] = __float_as_uint(o[2 * i + b][2 * r + eight]);
          transpose_quad(word, t);
#pragma unroll
          for (int i = 0; i < 4; ++i) got[2 * i + eight][2 * r + b] = __uint_as_float(word[i]);
        }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = got[j][i];
  }

  __device__ void store_whole(const DecodeCall& call, const DecodeItem& item) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      const int64_t at = (int64_t(item.start) * call.n_h + row) * S::d_v + warp * 64;
      if (call.out_f32) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (row < item.rows)
            *reinterpret_cast<float2*>(static_cast<float*>(call.o) + at + 8 * j + 2 * t) = {o[j][2 * r], o[j][2 * r + 1]};
        continue;
      }
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = bf16_pair(o[j + k][2 * r], o[j + k][2 * r + 1]);
        transpose_quad(word, t);
        if (row < item.rows)
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(call.o) + at + 8 * (j + t)) = {word[0], word[1], word[2], word[3]};
      }
    }
  }

  // Stores what a warp has of a piece, as the registers hold it.
  __device__ void store_piece(const DecodeCall& call, const DecodePartials& partial, const DecodeItem& item) {
    if constexpr (Codes) scale_output(unit, unit), place_columns();
    uint4* to = partial.o + partial_at(call.plan, item, item.piece, 0, warp * 4, S::d_v) + lane;
#pragma unroll
    for (int j = 0; j < 8; j += 2, to += item.pieces * 32)
      *to = {bf16_pair(o[j][0], o[j][1]), bf16_pair(o[j + 1][0], o[j + 1][1]), bf16_pair(o[j][2], o[j][3]),
             bf16_pair(o[j + 1][2], o[j + 1][3])};
    float* sums = partial.sums + partial_sums_at(call.plan, item, item.piece, 0) + softmax_row();
    const float sum = row_sum();
    if (lane % 16 == 0)
      sums[DecodePartials::reference] = m - S::lift, sums[DecodePartials::share] = sum, sums[DecodePartials::share + slab_rows] = 0;
  }

  // Divides a whole sequence's results by the sums and stores them.
  __device__ void store(const DecodeCall& call, const DecodeItem& item, int turn) {
    auto& sums = narrow_shared<Codes>().sum[turn];
    const float sum = row_sum();
    if (lane % 16 == 0) {
      const int row = softmax_row();
      sums[row] = sum;
      if (row < item.rows) call.lse[int64_t(item.start) * call.n_h + row] = sum > 0 ? (m - S::lift + log2f(sum)) * ln_2 : -INFINITY;
    }
    sync();
    auto scale = [&](float x) { return (x > 0 ? 1 / x : 0) * (Codes ? unit : 1); };
    scale_output(scale(sums[g]), scale(sums[g + 8]));
    if constexpr (Codes) place_columns();
    store_whole(call, item);
  }
};

template <bool Codes>
__global__ void __launch_bounds__(narrow_threads, 1)
    narrow_kernel(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ DecodeCall call,
                  const __grid_constant__ DecodePartials partial) {
  using S = NarrowShape<Codes>;
  const DecodePart& part = call.plan.parts[blockIdx.y];
  const int lane = int(threadIdx.x) & 31;
  const int first_page = lane < DecodePart::first_tiles ? part.page[lane] : 0;
  DecodeItem item = part.first;
  const int begin = part.begin, end = part.end;
  if (threadIdx.x == 32 * narrow_warps) {
    if (!Codes) prefetch_map(&kv_map);
    if (shared_address(narrow_memory) % 1024 != 0) __trap();  // swizzles count from there
    for (int i = 0; i < NarrowShape<Codes>::stages; ++i) {
      barrier_init(&narrow_shared<Codes>().full[i], 1);
      barrier_init(&narrow_shared<Codes>().empty[i], 32 * narrow_warps);
    }
    barrier_init(&narrow_shared<Codes>().met, 32 * narrow_warps);
    barrier_init_done();
  }
  __syncthreads();
  begin_kernel(true);  // queries and cache rows are there

  if (threadIdx.x >= 32 * narrow_warps) {
    NarrowLoader<Codes> loader(&kv_map, call, streams_by(part.tiles, S::stage_bytes * S::tile_stages));
    for (int i = begin; i < end; ++i) {
      if (i > begin) item = call.plan.items[i];
      loader.tiles(item, i == begin, first_page);
    }
    return;
  }
  NarrowWarp<Codes> w;
  int turn = 0;
  for (int i = begin; i < end; ++i) {
    if (i > begin) item = call.plan.items[i];
    const int limit = min(item.kv_count, item.limit + w.softmax_row() / call.n_h);
    w.begin(call, item);
    for (int t = item.tile_begin; t < item.tile_end; ++t) w.tile(item, t, limit, call.scale * log2_e);
    if (item.slot < 0)
      w.store(call, item, turn), turn ^= 1;
    else
      w.store_piece(call, partial, item);
  }
}

}  // namespace mla::cuda
