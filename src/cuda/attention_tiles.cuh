// Attention on Hopper over separate keys and values, with an online softmax. A piece of work is 128 query rows of one cache head. A block
// stays on its multiprocessor and goes from piece to piece: a warp hands them out, a thread copies tiles of 128 keys and values to shared
// memory; two warpgroups multiply, 64 rows each, and while one multiplies the other takes exponentials, fetches queries or stores results.
// Scores never leave the registers.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/wgmma.cuh"

namespace mla::cuda {
namespace {

constexpr int threads = 384, consumers = 256, group_rows = 64, block_rows = 2 * group_rows, tile = 128, stages = 2;
constexpr int box_bytes = tile * 128;  // 64 columns of a tile
// Pieces that a block remembers. Copies are at most two tiles, so two pieces, ahead of the products; one more is handed out before them,
// and one is stored beside the next one's first tile.
constexpr int works = 8;

// In boxes of 64 columns: the queries, then the stages, each its keys and its values.
template <int D_k, int D_v>
struct TileShape {
  static constexpr int k_boxes = (D_k + 63) / 64, v_boxes = D_v / 64;
  static constexpr int q_bytes = k_boxes * block_rows * 128, stage_bytes = (k_boxes + v_boxes) * box_bytes;
  static constexpr int shared_bytes = q_bytes + stages * stage_bytes + 1024;
  static constexpr int o_registers = D_v / 2;
};

struct TileWork;
struct TileBarriers {
  uint64_t k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
  uint64_t work[works], done[works], wanted;  // a piece has been handed out; nobody reads of it any more; the next may be
};

extern __shared__ __align__(1024) uint8_t tiles_memory[];

template <class S>
struct TileMemory {
  __device__ static uint8_t* q() { return tiles_memory; }
  __device__ static uint8_t* k(int stage) { return tiles_memory + S::q_bytes + stage * S::stage_bytes; }
  __device__ static uint8_t* v(int stage) { return k(stage) + S::k_boxes * box_bytes; }
  __device__ static TileBarriers& barriers() { return *reinterpret_cast<TileBarriers*>(k(stages)); }
  // Piece number i of this block.
  __device__ static TileWork& work(int i) { return reinterpret_cast<TileWork*>(k(stages) + sizeof(TileBarriers))[i % works]; }
  __device__ static void wait_work(int i) { barrier_wait(&barriers().work[i % works], i / works & 1); }
};

// How a launch is cut into pieces. Heads go in sections whose keys and values stay in the second-level cache together; within one the
// longest pieces come first.
struct TileGrid {
  int blocks, section;  // blocks of rows of a head, heads of a section
  int splits, pieces;   // of the context; of work in all
  int box_rows;         // rows that are neighbours in memory wherever a tile is cut
};

// 2^x by additions and multiplications, to 1e-4; of -inf 0. x is at most 127.
__device__ float exp2_sums(float x) {
  constexpr float round = 12582912;  // 1.5 × 2^23: what is added to it becomes a whole number
  x = fmaxf(x, -127);
  const float whole = x + round, f = x - (whole - round);
  const float y = fmaf(fmaf(fmaf(0.0550089f, f, 0.2422110f), f, 0.6932829f), f, 1.0f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(whole) << 23));
}

constexpr int fewest_split = 2;  // tiles that a split of the context has, unless it is empty

// A piece of work: rows [first, first + 128) of (token, head of the group), against cache rows [begin, end) of one head.
struct TileWork {
  GpuSpan span;
  int group, rows, first, head, begin, end, split;

  TileWork() = default;
  __device__ TileWork(const AttentionCall& c, const TileGrid& g, int piece) {
    split = piece % g.splits, piece /= g.splits;
    const int a_span = g.blocks * c.format.heads, in_span = piece % a_span;
    const int section = in_span / (g.blocks * g.section), at = in_span % (g.blocks * g.section);
    const int heads = min(g.section, c.format.heads - section * g.section);
    span = span_of(c, piece / a_span);
    head = section * g.section + at % heads;
    group = c.n_h / c.format.heads, rows = span.count * group;
    first = (g.blocks - 1 - at / heads) * block_rows;
    begin = end = 0;
    if (first >= rows) return;
    const int last_token = min(span.count - 1, (first + block_rows - 1) / group);
    begin = first_seen(c, span, span.position + first / group) / tile * tile;
    end = end_seen(c, span, span.position + last_token);
    const int part = max(fewest_split, (tiles() + g.splits - 1) / g.splits) * tile;
    begin += split * part, end = min(end, begin + (g.splits > 1 ? part : end));
  }
  __device__ int tiles() const { return end > begin ? (end - begin + tile - 1) / tile : 0; }
};

static_assert(sizeof(TileBarriers) + works * sizeof(TileWork) <= 1024);

// The thread that copies keys and values. Rows past the span's last stay as they are in shared memory. Many: blocks go from piece to piece;
// else a block has one, `only`.
template <class S, int D_k, int D_v, bool Many>
__device__ void load_tiles(const AttentionCall& c, int box_rows, const CUtensorMap* map, const TileWork& only) {
  constexpr TileMemory<S> memory{};
  TileBarriers& b = memory.barriers();
  for (int i = 0, n = 0;; ++i) {
    if (Many) memory.wait_work(i);
    const TileWork w = Many ? memory.work(i) : only;
    if (Many) barrier_arrive(&b.done[i % works]);
    auto part = [&](uint64_t* full, uint8_t* to, int boxes, int column, int first) {
      const int cuts = (min(tile, w.span.kv_count - first) + box_rows - 1) / box_rows;
      barrier_expect(full, cuts * boxes * box_rows * 128);
      for (int cut = 0; cut < cuts; ++cut) {
        const int j = first + cut * box_rows, page = j / c.page_tokens;
        const int y = j - page * c.page_tokens, z = page_of(c, w.span, page);
        for (int box = 0; box < boxes; ++box) copy_box(to + box * box_bytes + cut * box_rows * 128, map, full, column + box * 64, y, z);
      }
    };
    const int tiles = w.tiles();
    if (tiles == 0) return;
    for (int t = 0; t < tiles; ++t, ++n) {
      const int stage = n % stages, free = (n / stages & 1) ^ 1, first = w.begin + t * tile;
      if (Many && t == max(0, tiles - 2)) barrier_arrive(&b.wanted);
      barrier_wait(&b.k_empty[stage], free);
      part(&b.k_full[stage], memory.k(stage), S::k_boxes, w.head * D_k, first);
      barrier_wait(&b.v_empty[stage], free);
      part(&b.v_full[stage], memory.v(stage), S::v_boxes, c.format.heads * D_k + w.head * D_v, first);
    }
    if (!Many) return;
  }
}

// A warp: the results of a piece that sees nothing. What they would be merged into stays.
template <int D_v>
__device__ void store_nothing(const AttentionCall& c, const TileWork& w, int splits) {
  if (c.merge) return;
  const int lane = int(threadIdx.x) % 32;
  for (int r = w.first; r < min(w.first + block_rows, w.rows); ++r) {
    const int64_t token = int64_t(w.span.start) + r / w.group;
    const int head = w.head * w.group + r % w.group;
    if (lane == 0) c.lse[c.split_lse * w.split + token * c.lse_row + head * c.lse_head] = -INFINITY;
    if (splits > 1) continue;  // joining reads no more
    for (int column = 2 * lane; column < D_v; column += 64)
      *reinterpret_cast<float2*>(c.o + token * c.o_row + head * c.o_head + column) = float2{};
  }
}

// A warp asks for a piece's queries on their way to the second-level cache.
template <int D_k>
__device__ void fetch_queries(const AttentionCall& c, const TileWork& w) {
  constexpr int lines = (D_k * 4 + 127) / 128;
  const int rows = min(block_rows, w.rows - w.first);
  for (int i = int(threadIdx.x) % 32; i < rows * lines; i += 32) {
    const int r = w.first + i / lines;
    prefetch_l2(c.q + (int64_t(w.span.start) + r / w.group) * c.q_row + (w.head * w.group + r % w.group) * c.q_head + i % lines * 32);
  }
}

// The warp that hands out pieces: a block's first has its number, each later one is the next of all that nobody has, when the last two
// tiles of the one before are about to be copied. A piece without tiles is the end.
template <class S, int D_k, int D_v>
__device__ void hand_out(const AttentionCall& c, const TileGrid& g) {
  constexpr TileMemory<S> memory{};
  TileBarriers& b = memory.barriers();
  const int blocks = int(gridDim.x);
  // Every block asks once more than there is for it, so that the counter is back at 0 in the end.
  auto next = [&] {
    unsigned taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicInc(c.taken, unsigned(g.pieces) - 1);
    return blocks + int(__shfl_sync(~0u, taken, 0));
  };
  int piece = int(blockIdx.x);
  for (int i = 0;; ++i) {
    if (i > 0) barrier_wait(&b.wanted, (i - 1) & 1), piece = next();
    TileWork w{};
    for (; piece < g.pieces; piece = next()) {
      w = TileWork(c, g, piece);
      if (w.tiles() > 0) break;
      store_nothing<D_v>(c, w, g.splits);
      w = TileWork{};  // without tiles it already is; known to be zeros it takes no registers meanwhile
    }
    if (i >= works) barrier_wait(&b.done[i % works], (i / works - 1) & 1);
    if (threadIdx.x % 32 == 0) {
      memory.work(i) = w;
      barrier_arrive(&b.work[i % works]);
    }
    if (w.tiles() == 0) return;
    if (i > 0) fetch_queries<D_k>(c, w);
  }
}

// A warpgroup's thread: its rows are row and row + 8 of the block, its columns 8 i + 2 (lane % 4) + {0, 1}.
template <int D_k, int D_v, bool Many>
struct TileGroup {
  using S = TileShape<D_k, D_v>;
  static constexpr TileMemory<S> memory{};
  // Exponentials bound heads of 64: every fourth pair is worked out by sums there.
  static constexpr int sums_every = D_v == 64 ? 4 : tile;
  struct Sums {
    float m[2], l[2];  // reference, base 2, and this thread's share
  };
  const AttentionCall& c;
  int index, splits, thread, lane, row;
  int pieces = 0;  // that have begun
  const TileWork* w;
  int tiles = 0, first = 0;  // of the piece that have not been multiplied; the next tile's first row
  int seen_from[2], seen_to[2];
  Sums sums;

  __device__ TileGroup(const AttentionCall& call, int index_, int splits_, const TileWork& only)
      : c(call), index(index_), splits(splits_), thread(int(threadIdx.x) % 128), lane(thread % 32), w(&only) {
    row = index * group_rows + thread / 32 * 16 + lane / 4;
  }

  // Goes on to the block's next piece, with its queries in shared memory; false if there is none.
  __device__ bool next_piece() {
    if (Many) memory.wait_work(pieces);
    const TileWork* next = Many ? &memory.work(pieces) : w;
    const int more = __shfl_sync(~0u, next->tiles(), 0);
    if (more == 0) return false;
    ++pieces, w = next, tiles = more, first = w->begin;
    load_queries();
    const GpuSpan span = w->span;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = span.position + min(of_piece(*w, i) / w->group, span.count - 1);
      seen_from[i] = first_seen(c, span, position);
      seen_to[i] = of_piece(*w, i) < w->rows ? end_seen(c, span, position) : 0;
      sums.m[i] = -INFINITY, sums.l[i] = 0;
    }
    return true;
  }

  // This warpgroup's queries as bf16 into shared memory, 16 rows a warp, two at a time. All are on their way before the first is stored.
  __device__ void load_queries() const {
    constexpr int pairs = 8;
    const int begin = w->first / w->group, rows = index * group_rows + thread / 32 * 16, own = w->first + rows + lane % 16;
    const float* from = c.q + (int64_t(w->span.start) + begin) * c.q_row + w->head * w->group * c.q_head + lane % 16 * 4;
    const int at = own < w->rows ? int((own / w->group - begin) * c.q_row + own % w->group * c.q_head) : -1;  // of row lane % 16
    auto there = [&](int box) { return box * 64 + lane % 16 * 4 < D_k; };
    float4 x[pairs][S::k_boxes];
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int place = __shfl_sync(~0u, at, 2 * i + lane / 16);
#pragma unroll
      for (int box = 0; box < S::k_boxes; ++box)
        x[i][box] = place >= 0 && there(box) ? reinterpret_cast<const float4*>(from + place)[box * 16] : float4{};
    }
    named_sync(3 + index, 128);  // the products with the queries before have ended
    const int r = rows + lane / 16, byte = r * 128 + ((lane % 16 / 2 ^ lane / 16) * 16 + lane % 2 * 8);
#pragma unroll
    for (int i = 0; i < pairs; ++i)
#pragma unroll
      for (int box = 0; box < S::k_boxes; ++box)
        if (there(box))
          *reinterpret_cast<uint2*>(memory.q() + box * (block_rows * 128) + (byte ^ i % 4 * 32) + i * 256) = {
              bf16_pair(x[i][box].x, x[i][box].y), bf16_pair(x[i][box].z, x[i][box].w)};
    publish_shared();
    named_sync(3 + index, 128);
  }

  // The warpgroups' products take turns, so that one's exponentials fall into the other's.
  __device__ void begin_turn() const { named_sync(1 + index, 256); }
  __device__ void end_turn() const { named_arrive(2 - index, 256); }
  __device__ void free(uint64_t& barrier) const {
    if (lane == 0) barrier_arrive(&barrier);
  }

  // s = Q Kᵀ
  __device__ void scores(float (&s)[tile / 2], int stage) const {
    const uint64_t q = wgmma_operand(shared_address(memory.q()) + index * group_rows * 128),
                   k = wgmma_operand(shared_address(memory.k(stage)));
#pragma unroll
    for (int i = 0; i < D_k / 16; ++i)
      wgmma<false>(s, q + (i / 4 * (block_rows * 128) + i % 4 * 32) / 16, k + (i / 4 * box_bytes + i % 4 * 32) / 16, i > 0);
    wgmma_commit();
  }
  // o += P V
  __device__ void values(float (&o)[S::o_registers], const uint32_t (&p)[tile / 4], int stage, bool begins) const {
    const uint64_t v = wgmma_operand(shared_address(memory.v(stage)), box_bytes);
#pragma unroll
    for (int i = 0; i < tile / 16; ++i) wgmma<true>(o, p + 4 * i, v + i * 16 * 128 / 16, i > 0 || !begins);
    wgmma_commit();
  }

  // In a piece's last tile, zeroes the values of rows that are not the span's: 0 × NaN is NaN. Both warpgroups do, neither waits for the
  // other.
  __device__ void clear_values(int stage, int parity) const {
    const int valid = __shfl_sync(~0u, w->span.kv_count, 0) - (first - tile);
    if (valid >= tile) return;
    barrier_wait(&memory.barriers().v_full[stage], parity);
    for (int box = 0; box < S::v_boxes; ++box)
      for (int i = valid * 8 + thread; i < tile * 8; i += 128) reinterpret_cast<uint4*>(memory.v(stage) + box * box_bytes)[i] = uint4{};
    publish_shared();
    named_sync(3 + index, 128);
  }

  // The scores of the next tile become probabilities; what was summed before must be multiplied by `factor`.
  __device__ void softmax(float (&s)[tile / 2], float (&factor)[2]) {
    if (first + tile > min(seen_to[0], seen_to[1]) || first < max(seen_from[0], seen_from[1])) {
#pragma unroll
      for (int i = 0; i < tile / 2; ++i) {
        const int j = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (j < seen_from[i / 2 % 2] || j >= seen_to[i / 2 % 2]) s[i] = -INFINITY;
      }
    }
    const float scale = c.scale * log2_e;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < tile / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      top = quad_max(top) * scale;
      // The reference moves only where a score exceeds it by 2^8: f32 sums and bf16 probabilities are as exact below as at 1.
      float& m = sums.m[r];
      const float next = top > m + 8 ? top : m, base = next == -INFINITY ? 0 : next;
      factor[r] = m == next ? 1 : fast_exp2(m - next);
      m = next;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < tile / 8; ++i) {
        float &x = s[4 * i + 2 * r], &y = s[4 * i + 2 * r + 1];
        if (i % sums_every == sums_every - 1)
          x = exp2_sums(fmaf(x, scale, -base)), y = exp2_sums(fmaf(y, scale, -base));
        else
          x = fast_exp2(fmaf(x, scale, -base)), y = fast_exp2(fmaf(y, scale, -base));
        sum += x + y;
      }
      sums.l[r] = sums.l[r] * factor[r] + sum;
    }
    first += tile, --tiles;
  }

  __device__ static void narrow(uint32_t (&p)[tile / 4], const float (&s)[tile / 2]) {
#pragma unroll
    for (int i = 0; i < tile / 4; ++i) p[i] = bf16_pair(s[2 * i], s[2 * i + 1]);
  }

  // Tiles are counted over all pieces. A turn is a tile's scores with the values of the one before, whichever pieces they are of.
  __device__ void run() {
    TileBarriers& b = memory.barriers();
    if (!next_piece()) return;
    if (index == 1) end_turn();  // the first warpgroup begins
    float o[S::o_registers], factor[2];
    uint32_t p[tile / 4];
    bool begins = true;
    {
      float s[tile / 2];
      barrier_wait(&b.k_full[0], 0);
      begin_turn();
      wgmma_begin();
      scores(s, 0);
      end_turn();
      wgmma_wait<0>();
      free(b.k_empty[0]);
      softmax(s, factor);
      narrow(p, s);
    }
    int before = 0, parity_before = 0;
    for (int n = 1;; ++n) {
      const int stage = n % stages, parity = n / stages & 1;
      before = (n - 1) % stages, parity_before = (n - 1) / stages & 1;
      const bool fresh = tiles == 0;
      const TileWork* old = w;
      const Sums old_sums = sums;
      if (fresh) {
        clear_values(before, parity_before);
        if (!Many || !next_piece()) break;
      }
      float s[tile / 2];
      barrier_wait(&b.k_full[stage], parity);
      begin_turn();
      wgmma_begin();
      scores(s, stage);
      barrier_wait(&b.v_full[before], parity_before);
      wgmma_begin();
      values(o, p, before, begins);
      end_turn();
      wgmma_wait<1>();
      free(b.k_empty[stage]);
      wgmma_wait<0>();
      free(b.v_empty[before]);
      softmax(s, factor);
      narrow(p, s);
      begins = Many && fresh;
      if (Many && fresh) {
        store(o, *old, old_sums);
        barrier_arrive(&b.done[(pieces - 2) % works]);
      } else if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (int i = 0; i < S::o_registers; ++i) o[i] *= factor[i / 2 % 2];
      }
    }
    barrier_wait(&b.v_full[before], parity_before);
    begin_turn();
    wgmma_begin();
    values(o, p, before, begins);
    end_turn();
    wgmma_wait<0>();
    store(o, *w, sums);
  }

 private:
  // Divides the sums and stores them. Lanes exchange pairs, so that each has four columns that are neighbours: an even lane of one eight,
  // an odd one of the next.
  __device__ void store(const float (&o)[S::o_registers], const TileWork& of, const Sums& x) const {
    float total[2], before[2], scale[2], other[2] = {};
    float* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] = quad_sum(x.l[i]);
      before[i] = c.merge && there(of, i) ? c.lse[sum_at(of, i)] : -INFINITY;
    }
    __syncwarp();  // a row's four lanes have read its sum
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float lse = total[i] > 0 ? (x.m[i] + log2f(total[i])) * ln_2 : -INFINITY, own = 1;
      if (c.merge) merge_weights(lse, before[i], own, other[i]);
      if (there(of, i) && lane % 4 == 0) c.lse[sum_at(of, i)] = lse;
      scale[i] = total[i] > 0 ? own / total[i] : 0;
      to[i] = c.o + c.split_o * of.split + token(of, i) * c.o_row + query_head(of, i) * c.o_head + lane % 2 * 8 + lane % 4 / 2 * 4;
      if (!there(of, i) || (splits > 1 && lse == -INFINITY)) to[i] = nullptr;  // nobody's row, or nothing that joining reads
    }
    const bool odd = lane % 2;
#pragma unroll
    for (int n = 0; n < S::o_registers; n += 8) {
      float a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float got = __shfl_xor_sync(~0u, odd ? o[n + r] : o[n + 4 + r], 1);
        a[r] = odd ? got : o[n + r], b[r] = odd ? o[n + 4 + r] : got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!to[i]) continue;
        float4 y{a[2 * i] * scale[i], a[2 * i + 1] * scale[i], b[2 * i] * scale[i], b[2 * i + 1] * scale[i]};
        auto* at = reinterpret_cast<float4*>(to[i] + n * 2);
        if (other[i] > 0) {
          const float4 old = *at;
          y.x += other[i] * old.x, y.y += other[i] * old.y, y.z += other[i] * old.z, y.w += other[i] * old.w;
        }
        *at = y;
      }
    }
  }

  // Of this thread's row i of a piece.
  __device__ int of_piece(const TileWork& of, int i) const { return of.first + row + 8 * i; }
  __device__ bool there(const TileWork& of, int i) const { return of_piece(of, i) < of.rows; }
  __device__ int64_t token(const TileWork& of, int i) const { return int64_t(of.span.start) + of_piece(of, i) / of.group; }
  __device__ int query_head(const TileWork& of, int i) const { return of.head * of.group + of_piece(of, i) % of.group; }
  __device__ int64_t sum_at(const TileWork& of, int i) const {
    return c.split_lse * of.split + token(of, i) * c.lse_row + query_head(of, i) * c.lse_head;
  }
};

template <int D_k, int D_v, bool Many>
__global__ void __launch_bounds__(threads, 1)
    tiles_kernel(const __grid_constant__ AttentionCall c, const __grid_constant__ CUtensorMap map, TileGrid grid) {
  using S = TileShape<D_k, D_v>;
  constexpr TileMemory<S> memory{};
  if (threadIdx.x == 256) {
    if (shared_address(tiles_memory) % 1024 != 0) __trap();  // swizzles count from there
    prefetch_map(&map);
    TileBarriers& b = memory.barriers();
    for (int i = 0; i < stages; ++i) {
      barrier_init(&b.k_full[i], 1), barrier_init(&b.v_full[i], 1);
      barrier_init(&b.k_empty[i], 8), barrier_init(&b.v_empty[i], 8);
    }
    for (int i = 0; i < works; ++i) barrier_init(&b.work[i], 1), barrier_init(&b.done[i], consumers + 1);
    barrier_init(&b.wanted, 1);
    barrier_init_done();
  }
  __syncthreads();
  begin_kernel();
  const TileWork only = Many ? TileWork{} : TileWork(c, grid, int(blockIdx.x));
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  if (group == 2) {
    give_registers<56>();
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
    if (warp == 8 && elect_lane()) load_tiles<S, D_k, D_v, Many>(c, grid.box_rows, &map, only);
    if (warp == 9) {
      if constexpr (Many)
        hand_out<S, D_k, D_v>(c, grid);
      else if (only.tiles() == 0)
        store_nothing<D_v>(c, only, grid.splits);
    }
  } else {
    take_registers<224>();
    TileGroup<D_k, D_v, Many>(c, group, grid.splits, only).run();
  }
}

}  // namespace
}  // namespace mla::cuda
