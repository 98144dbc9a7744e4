// Absorbed decode of sequences with up to 16 (query, head) rows, d_c 512 + d_R 64: a team of eight warps multiplies, or two of them, and
// one warp loads.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace mla::cuda {

constexpr int narrow_rows = 16, team_warps = 8, team_threads = 32 * team_warps;

// Codes: the cache has f8 codes, which become f16 on their way to the matrix units.
template <bool Codes>
struct NarrowShape {
  static constexpr KvFormat format{KvLayout::mla(512, 64), Codes ? DType::f8 : DType::bf16};
  static constexpr int d_k = 576, d_v = 512, row_bytes = int(format.row_bytes());
  // Where columns 512 to 575 and the scales are in a row of codes.
  static constexpr int kept_offset = int(format.kept_offset()), scale_offset = int(format.scale_offset());
  static constexpr int stage_rows = Codes ? 64 : 32, stages = Codes ? 4 : 5, tile_stages = tile_tokens / stage_rows;
  static constexpr int stage_bytes = stage_rows * row_bytes, box_bytes = stage_rows * 128;
  // Two teams take a sequence's tiles in turns and join at its end: codes are many instructions, which wait for one another.
  static constexpr int teams = Codes ? 2 : 1, threads = teams * team_threads;
  static_assert(teams == 1 || teams == 2);
  // Registers change hands by four warps at a time, so with the warp that loads go three that do nothing but give theirs.
  static constexpr int idle_threads = Codes ? 96 : 0, all_threads = threads + 32 + idle_threads;
  static constexpr int registers = 65536 / all_threads / 8 * 8, loader_registers = 32, team_registers = 112;  // a thread, of codes
  static_assert(!Codes || threads * team_registers + (all_threads - threads) * loader_registers <= all_threads * registers);
  static constexpr float lift = Codes ? 7 : 0;  // probabilities in f16 are so much larger, base 2, since they meet small scales
  static_assert(!Codes || lift + headroom_log2 < 16);
};

// What a block keeps in shared memory behind its stages. Neighbouring rows begin 8 or 4 banks apart.
template <bool Codes>
struct NarrowShared {
  using S = NarrowShape<Codes>;
  float score[S::teams][4][narrow_rows][tile_tokens + 8];  // the shares of four quarters of the columns
  uint16_t p[S::teams][narrow_rows][tile_tokens + 8];      // probabilities
  uint32_t weight[S::teams][4][4][8];  // scales' shares of 2^(exponent - 126) in f16, of each quarter; [t][i] has tokens 8 i + 2 t + {0, 1}
  float largest[S::teams][4][narrow_rows];  // of queries, in each quarter
  float factor[S::teams][narrow_rows];
  float sum[S::teams][2][narrow_rows];                                   // sequences take turns
  float share[S::teams][narrow_rows], reference[S::teams][narrow_rows];  // sums and what they refer to, of teams that join
  float4 handed[S::teams == 2 ? 4 * team_threads : 1];                   // half of the second's results; the other lies in its scores
  uint64_t full[S::stages], empty[S::stages], met[S::teams], joined;
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
  __device__ void next(int by = 1) {
    stage += by;
    if (stage >= NarrowShape<Codes>::stages) stage -= NarrowShape<Codes>::stages, parity ^= 1;
  }
};

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
#pragma unroll 1  // unrolled, it wants more registers than are left
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
  int team, half, quarter, met_parity = 0;
  NarrowRing<Codes> ring;
  uint32_t q[steps][4];
  float o[8][4];     // columns 8 i + 2 t + {0, 1} of rows g and g + 8; of codes, as `place_columns` says
  int exponent;      // codes' scales were divided by 2^(exponent - 126)
  float m, l;        // the softmax's row: reference (base 2), this lane's share of the sum
  float scale_log2;  // of its scores

  __device__ NarrowWarp() {
    const int w = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
    team = w / team_warps, warp = w % team_warps, lane = int(threadIdx.x) & 31, g = lane / 4, t = lane & 3;
    half = warp & 1, quarter = warp / 2;
    ring.next(team * S::tile_stages);
  }

  __device__ void sync() {
    barrier_arrive(&narrow_shared<Codes>().met[team]);
    barrier_wait(&narrow_shared<Codes>().met[team], met_parity);
    met_parity ^= 1;
  }
  // Twice for each sequence that both have, so that the parities are 0 and 1.
  __device__ void sync_teams(int parity) const {
    barrier_arrive(&narrow_shared<Codes>().joined);
    barrier_wait(&narrow_shared<Codes>().joined, parity);
  }
  __device__ float unit() const { return power_of_two(exponent - 126); }
  __device__ int softmax_row() const { return 2 * warp + lane / 16; }

  // Rows past the item's last repeat it.
  __device__ void begin(const DecodeCall& call, const DecodeItem& item) {
    const auto* from = static_cast<const __nv_bfloat16*>(call.q) + int64_t(item.start) * call.n_h * S::d_k;
    const __nv_bfloat16* row[2];
    for (int i = 0; i < 2; ++i) row[i] = from + max(0, min(g + 8 * i, item.rows - 1)) * S::d_k;
    scale_log2 = call.scale * log2_e;
    if constexpr (Codes)
      load_queries_f16(row);
    else
      for (int i = 0; i < 2; ++i) load_query(row[i], i);
#pragma unroll
    for (int j = 0; j < 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
    exponent = 0, m = -INFINITY, l = 0;
  }
  __device__ void load_query(const __nv_bfloat16* row, int i) {
#pragma unroll
    for (int j = 0; j < steps; ++j) {
      const int column = (j < 8 ? quarter * 128 + j * 16 : S::d_v + quarter * 16) + 2 * t;
      q[j][i] = *reinterpret_cast<const uint32_t*>(row + column);
      q[j][2 + i] = *reinterpret_cast<const uint32_t*>(row + column + 8);
    }
  }
  // Rows are divided by powers of two that leave their largest between 2^14 and 2^15, but for rows so small that no score differs, whose
  // power must not make scale_log2 0. The order of a sum's terms is free: lane t has 32 neighbouring columns of its quarter, four a step.
  __device__ void load_queries_f16(const __nv_bfloat16* const (&row)[2]) {
    auto& largest = narrow_shared<Codes>().largest[team];
    uint32_t x[2][18];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto* latents = reinterpret_cast<const uint4*>(row[i] + quarter * 128 + 32 * t);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 eight = latents[j];
        x[i][4 * j] = eight.x, x[i][4 * j + 1] = eight.y, x[i][4 * j + 2] = eight.z, x[i][4 * j + 3] = eight.w;
      }
      const uint2 rotary = *reinterpret_cast<const uint2*>(row[i] + S::d_v + quarter * 16 + 4 * t);
      x[i][16] = rotary.x, x[i][17] = rotary.y;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = 0;
#pragma unroll
      for (int j = 0; j < 18; ++j) {
        const float2 y = widen_pair(x[i][j]);
        most = fmaxf(most, fmaxf(fabsf(y.x), fabsf(y.y)));
      }
      most = quad_max(most);
      if (half == 0 && t == 0) largest[quarter][g + 8 * i] = most;
    }
    sync();
    auto exponent_of = [&](int r) {
      const float most = fmaxf(fmaxf(largest[0][r], largest[1][r]), fmaxf(largest[2][r], largest[3][r]));
      return max((__float_as_int(most) >> 23) - 127, -64) - 14;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float by = power_of_two(-exponent_of(g + 8 * i));
#pragma unroll
      for (int j = 0; j < 18; ++j) {
        const float2 y = widen_pair(x[i][j]);
        q[j / 2][j % 2 * 2 + i] = j < 16 ? f16_pair(y.x * by, y.y * by) : bf16_pair(y.x * by, y.y * by);
      }
    }
    scale_log2 *= power_of_two(exponent_of(softmax_row()));
  }

  __device__ static const uint8_t* stage_at(int stage) { return narrow_memory + stage * S::stage_bytes; }

  __device__ void store_scores(const float (&s)[4][4]) const {
    auto& score = narrow_shared<Codes>().score[team][quarter];
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
        multiply_bf16(s[i], q[2 * j], {x[0], x[1]});
        multiply_bf16(s[i], q[2 * j + 1], {x[2], x[3]});
      }
    const uint32_t rotary =
        shared_address(stage) + 8 * S::box_bytes + (lane / 16 * 8 + (lane & 7)) * 128 + (((quarter * 2 + (lane / 8 & 1)) ^ lane) & 7) * 16;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t x[4];
      load_matrices(x, rotary + i * 1024);
      multiply_bf16(s[i], q[8], {x[0], x[1]});
      multiply_bf16(s[i + 1], q[8], {x[2], x[3]});
    }
    store_scores(s);
  }
  __device__ void scores(const uint8_t* stage) const requires(Codes) {
    float s[4][4] = {};
    const uint8_t* rows = stage + 32 * half * S::row_bytes;
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint8_t* row = rows + (8 * i + g) * S::row_bytes + quarter * 128 + 32 * t + 16 * j;
        const uint4 x = *reinterpret_cast<const uint4*>(row), y = *reinterpret_cast<const uint4*>(row + 8 * S::row_bytes);
        const uint32_t word[2][4] = {{x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w}};
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int h = 0; h < 2; ++h) multiply_f16(s[i + h], q[4 * j + k], codes_f16(word[h][k]));
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* column = rows + (8 * i + 2 * t) * S::row_bytes + S::scale_offset + quarter * 4;
      const float x = *reinterpret_cast<const float*>(column), y = *reinterpret_cast<const float*>(column + S::row_bytes);
      s[i][0] *= x, s[i][1] *= y, s[i][2] *= x, s[i][3] *= y;
      const uint2 rotary = *reinterpret_cast<const uint2*>(rows + (8 * i + g) * S::row_bytes + S::kept_offset + (quarter * 16 + 4 * t) * 2);
      multiply_bf16(s[i], q[8], rotary);
    }
    store_scores(s);
  }

  // Two rows a warp, four tokens a lane; `limit`: how many rows of the cache this lane's row sees.
  __device__ void softmax(int token, int limit) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    const int row = softmax_row(), column = lane % 16 * 4;
    float x[4] = {-0.f, -0.f, -0.f, -0.f};  // adding to which is no instruction
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 y = *reinterpret_cast<const float4*>(&shared.score[team][i][row][column]);
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
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = fast_exp2(fmaf(x[i], scale_log2, -base));
    l = l * factor + (x[0] + x[1] + (x[2] + x[3]));
    const uint2 p = Codes ? uint2{f16_pair(x[0], x[1]), f16_pair(x[2], x[3])} : uint2{bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3])};
    *reinterpret_cast<uint2*>(&shared.p[team][row][column]) = p;
    if (lane % 16 == 0) shared.factor[team][row] = factor;
  }

  // Scales of a quarter of the columns as shares of a power of two that exceeds all so far, two tokens a lane.
  __device__ void weigh(const uint8_t* stage) requires(Codes) {
    const uint8_t* at = stage + 2 * lane * S::row_bytes + S::scale_offset + quarter * 4;
    const float x = *reinterpret_cast<const float*>(at), y = *reinterpret_cast<const float*>(at + S::row_bytes);
    const int most = __reduce_max_sync(~0u, max(__float_as_int(x), __float_as_int(y))) >> 23;  // they are positive or 0
    if (most > exponent) {
      const float factor = power_of_two(exponent - most);
      scale_output(factor, factor);
      exponent = most;
    }
    const float by = power_of_two(126 - exponent);
    if (half == 0) narrow_shared<Codes>().weight[team][quarter][lane & 3][lane / 4] = f16_pair(x * by, y * by);
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
    const float upper = shared.factor[team][g], lower = shared.factor[team][g + 8];
    if (__any_sync(~0u, upper != 1 || lower != 1)) scale_output(upper, lower);
  }

  __device__ void probabilities(uint32_t (&a)[4], int step) const {
    load_matrices(a, shared_address(&narrow_shared<Codes>().p[team][lane & 15][step * 16 + lane / 16 * 8]));
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
        multiply_bf16(o[2 * j], a, {x[0], x[1]});
        multiply_bf16(o[2 * j + 1], a, {x[2], x[3]});
      }
    }
  }

  // The same over a stage's 64 tokens of codes. Probabilities take the tokens' scales along.
  __device__ void values(const uint8_t* stage, int) requires(Codes) {
    const uint8_t* rows = stage + 2 * t * S::row_bytes;
    constexpr int token[4] = {0, 1, 8, 9};
    const auto* weight = reinterpret_cast<const uint4*>(narrow_shared<Codes>().weight[team][quarter][t]);
    const uint4 first = weight[0], second = weight[1];
    const uint32_t of[4][2] = {{first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      probabilities(a, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = multiply_f16_pairs(a[i], of[k][i / 2]);
      uint2 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const uint2*>(rows + (16 * k + token[i]) * S::row_bytes + warp * 64 + 8 * g);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // columns j and j + 1 of this lane's eight
        const uint32_t pick = j % 4 == 0 ? 0x5140 : 0x7362;
        const uint32_t b0 = __byte_perm(j < 4 ? x[0].x : x[0].y, j < 4 ? x[1].x : x[1].y, pick),
                       b1 = __byte_perm(j < 4 ? x[2].x : x[2].y, j < 4 ? x[3].x : x[3].y, pick);
        const uint2 x0 = codes_f16(b0), x1 = codes_f16(b1);
        multiply_f16(o[j], a, {x0.x, x1.x});
        multiply_f16(o[j + 1], a, {x0.y, x1.y});
      }
    }
  }

  // Zeroes a tile's rows from `valid` on: what is there is not the sequence's, and 0 × NaN is NaN.
  __device__ void clear(const int (&stage)[2], int valid) {
    if (valid >= tile_tokens) return;
    for (int i = 0; i < S::tile_stages; ++i) {
      const int from = max(0, valid - i * S::stage_rows);
      auto* at = reinterpret_cast<uint4*>(narrow_memory + stage[i] * S::stage_bytes);
      constexpr int box_rows = Codes ? S::row_bytes / 16 : 8, boxes = Codes ? 1 : S::d_k / 64;  // in 16 bytes
      for (int box = 0; box < boxes; ++box)
#pragma unroll 1  // the same
        for (int j = from * box_rows + 32 * warp + lane; j < S::stage_rows * box_rows; j += team_threads)
          at[box * S::box_bytes / 16 + j] = uint4{};
    }
    publish_shared();
    sync();
  }

  __device__ void tile(const DecodeItem& item, int tile, int limit) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    int stage[2] = {ring.stage, ring.stage};
    int parity[2] = {ring.parity, ring.parity};
    if constexpr (S::tile_stages == 2) ring.next(), stage[1] = ring.stage, parity[1] = ring.parity;
    ring.next((S::teams - 1) * S::tile_stages + 1);
    const int token = tile * tile_tokens, valid = item.kv_count - token;
    barrier_wait(&shared.full[stage[0]], parity[0]);
    if (S::tile_stages == 2 && (half == 1 || valid < tile_tokens)) barrier_wait(&shared.full[stage[1]], parity[1]);
    clear(stage, valid);
    scores(stage_at(half == 0 ? stage[0] : stage[1]));
    sync();
    if constexpr (Codes) weigh(stage_at(stage[0]));
    softmax(token, limit);
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
    if constexpr (Codes) scale_output(unit(), unit()), place_columns();
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

  // Adds the second team's results to the first's.
  __device__ void join() requires(S::teams == 2) {
    NarrowShared<Codes>& shared = narrow_shared<Codes>();
    auto place = [&](int j) -> float4& {
      auto* eights = j < 4 ? reinterpret_cast<float4*>(shared.score[1]) : shared.handed;
      return eights[j % 4 * team_threads + 32 * warp + lane];
    };
    const int row = softmax_row();
    const float sum = row_sum();
    if (lane % 16 == 0) shared.share[team][row] = sum, shared.reference[team][row] = m;
    scale_output(unit(), unit());
    if (team == 1)
#pragma unroll
      for (int j = 0; j < 8; ++j) place(j) = {o[j][0], o[j][1], o[j][2], o[j][3]};
    sync_teams(0);
    if (team == 0) {
      auto larger = [&](int r) { return fmaxf(shared.reference[0][r], shared.reference[1][r]); };
      auto factor = [&](int of, int r) { return rescale(shared.reference[of][r], larger(r)); };
      const float upper = factor(1, g), lower = factor(1, g + 8);
      scale_output(factor(0, g), factor(0, g + 8));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 x = place(j);
        o[j][0] += x.x * upper, o[j][1] += x.y * upper, o[j][2] += x.z * lower, o[j][3] += x.w * lower;
      }
      exponent = 126, m = larger(row);
      l = lane % 16 == 0 ? shared.share[0][row] * factor(0, row) + shared.share[1][row] * factor(1, row) : 0;
    }
    sync_teams(1);  // what was handed over has been read
  }

  // Divides a whole sequence's results by the sums and stores them.
  __device__ void store(const DecodeCall& call, const DecodeItem& item, int turn) {
    auto& sums = narrow_shared<Codes>().sum[team][turn];
    const float sum = row_sum();
    if (lane % 16 == 0) {
      const int row = softmax_row();
      sums[row] = sum;
      if (row < item.rows) call.lse[int64_t(item.start) * call.n_h + row] = sum > 0 ? (m - S::lift + log2f(sum)) * ln_2 : -INFINITY;
    }
    sync();
    auto scale = [&](float x) { return (x > 0 ? 1 / x : 0) * (Codes ? unit() : 1); };
    scale_output(scale(sums[g]), scale(sums[g + 8]));
    if constexpr (Codes) place_columns();
    store_whole(call, item);
  }
};

template <bool Codes>
__global__ void __launch_bounds__(NarrowShape<Codes>::all_threads, 1)
    narrow_kernel(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ DecodeCall call,
                  const __grid_constant__ DecodePartials partial) {
  using S = NarrowShape<Codes>;
  const DecodePart& part = call.plan.parts[blockIdx.y];
  const int lane = int(threadIdx.x) & 31;
  const int first_page = lane < DecodePart::first_tiles ? part.page[lane] : 0;
  DecodeItem item = part.first;
  const int begin = part.begin, end = part.end;
  if (threadIdx.x == S::threads) {
    if (!Codes) prefetch_map(&kv_map);
    if (shared_address(narrow_memory) % 1024 != 0) __trap();  // swizzles count from there
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&narrow_shared<Codes>().full[i], 1);
      barrier_init(&narrow_shared<Codes>().empty[i], team_threads);
    }
    barrier_init(&narrow_shared<Codes>().joined, S::threads);
    for (int i = 0; i < S::teams; ++i) barrier_init(&narrow_shared<Codes>().met[i], team_threads);
    barrier_init_done();
  }
  __syncthreads();
  begin_kernel(true);  // queries and cache rows are there

  if (threadIdx.x >= S::threads) {
    if constexpr (Codes) give_registers<S::loader_registers>();
    if (threadIdx.x >= S::threads + 32) return;
    NarrowLoader<Codes> loader(&kv_map, call, streams_by(part.tiles, S::stage_bytes * S::tile_stages));
    for (int i = begin; i < end; ++i) {
      if (i > begin) item = call.plan.items[i];
      loader.tiles(item, i == begin, first_page);
    }
    return;
  }
  if constexpr (Codes) take_registers<S::team_registers>();
  NarrowWarp<Codes> w;
  int before = 0;  // tiles of the items before
  for (int i = begin; i < end; ++i) {
    if (i > begin) item = call.plan.items[i];
    const int limit = min(item.kv_count, item.limit + w.softmax_row() / call.n_h);
    const int first = (w.team - before) & (S::teams - 1);
    const bool both = S::teams == 2 && item.tile_end - item.tile_begin > 1;
    before += item.tile_end - item.tile_begin;
    if (!both && first > 0) continue;  // the other team's
    w.begin(call, item);
    for (int t = item.tile_begin + first; t < item.tile_end; t += S::teams) w.tile(item, t, limit);
    if constexpr (S::teams == 2)
      if (both) {
        w.join();
        if (w.team == 1) continue;
      }
    if (item.slot < 0)
      w.store(call, item, i & 1);
    else
      w.store_piece(call, partial, item);
  }
}

}  // namespace mla::cuda
