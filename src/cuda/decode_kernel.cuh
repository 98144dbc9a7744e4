// The kernel of absorbed decode, for rows of Tiles × 64 columns whose first Values columns are the values.
#pragma once

#include "cuda/decode_codes.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/wgmma.cuh"

namespace mla::cuda {

// The warps that load: queries box by box, tiles box by box in the order in which the warpgroups free and need them.
template <class S>
struct DecodeLoader {
  static constexpr DecodeBlock<S> b{};
  const CUtensorMap *q_map, *kv_map;
  const DecodeCall& call;
  int lane, tiles_a_page, q_rows;
  // Where blocks share tiles, the next pair is fetched into the second-level cache, so that copies wait for memory less; not where they are
  // the first to leave it, for what is fetched is not.
  bool fetches;
  uint64_t policy;
  int q_parity = 1, parity[2] = {1, 1};  // of the emptiness that is waited for; the elected lane's

  __device__ DecodeLoader(const CUtensorMap* q, const CUtensorMap* kv, const DecodeCall& c, bool first_to_go)
      : q_map(q),
        kv_map(kv),
        call(c),
        lane(int(threadIdx.x) & 31),
        tiles_a_page(c.kv.page_tokens / tile_tokens),
        q_rows(query_rows(c.plan.most_rows)),
        fetches(gridDim.x > 1 && !first_to_go),
        policy(cache_policy(first_to_go)) {}

  // In the elected lane, as `boxes`, `even_tile` and `odd_tile`. Rows past the item's last may be other sequences': no row's result depends
  // on another's.
  __device__ void query_box(const DecodeItem& item, int first, int box) const {
    barrier_expect(&b.shared().q_full[box], q_rows * 128);
    copy_box(b.q() + box * box_bytes, q_map, &b.shared().q_full[box], box * 64, item.start * call.n_h + first, 0);
  }
  __device__ void queries(const DecodeItem& item, int first) {
    barrier_wait(&b.shared().q_empty, q_parity);
    q_parity ^= 1;
    if (elect_lane())
      for (int box = 0; box < S::boxes; ++box) query_box(item, first, box);
    __syncwarp();
  }

  // A part's first queries with its first tile, so that products begin with the first columns of both.
  __device__ void queries_beside_tile(const DecodeItem& item, int first, int y, int page) {
    q_parity ^= 1, parity[0] ^= 1;
    if (elect_lane())
      for (int box = 0; box < S::boxes; ++box) query_box(item, first, box), boxes(0, box, box + 1, y, page);
    __syncwarp();
  }

  __device__ void boxes(int tile, int from, int to, int y, int page) const {
    for (int box = from; box < to; ++box) {
      uint64_t* full = &b.shared().full[tile][box];
      uint8_t* at = b.k(tile) + box * box_bytes;
      barrier_expect(full, box_bytes);
      copy_box(at, kv_map, full, box * 64, y, page, policy);
    }
  }

  // The second half of an odd tile is free and needed before its first; the box that held probabilities goes with the half that read it.
  __device__ void even_tile(int y, int page) {
    barrier_wait(&b.shared().empty[0][0], parity[0]);
    boxes(0, 0, S::half_boxes, y, page);
    barrier_wait(&b.shared().empty[0][1], parity[0]);
    boxes(0, S::half_boxes, S::boxes, y, page);
    parity[0] ^= 1;
  }
  __device__ void odd_tile(int y, int page) {
    barrier_wait(&b.shared().empty[1][1], parity[1]);
    boxes(1, S::half_boxes, S::value_boxes, y, page);
    barrier_wait(&b.shared().empty[1][0], parity[1]);
    boxes(1, 0, S::half_boxes, y, page);
    boxes(1, S::value_boxes, S::boxes, y, page);
    parity[1] ^= 1;
  }

  __device__ int row_of(int tile) const { return tile % tiles_a_page * tile_tokens; }

  // Brings a tile into the second-level cache, with the other blocks that go through the same items.
  __device__ void fetch(int y, int page) const {
    const int row_bytes = call.kv.format.layout.d_k * 2, bytes = tile_tokens * row_bytes;
    const std::byte* from = call.kv.base + page * call.kv.page_bytes + y * row_bytes;
    constexpr int line = 128;
    for (int at = (int(blockIdx.x) * 32 + lane) * line; at < bytes; at += int(gridDim.x) * 32 * line) prefetch_l2(from + at);
  }

  __device__ void fetch_pair(const DecodeItem& item, int t) const {
    const int mine = t + lane < item.tile_end ? call.plan.pages[item.table + (t + lane) / tiles_a_page] : 0;
    for (int i = 0; i < 2; ++i)
      if (t + i < item.tile_end) fetch(row_of(t + i), __shfl_sync(~0u, mine, i));
  }

  // `first_page`: a part's first item has its first pages here, one a lane. The first `done` tiles are on their way.
  __device__ void tiles(const DecodeItem& item, bool has_first, int first_page, int done) {
    int pages = 0;
    auto page_of = [&](int t) { return t < item.tile_end ? call.plan.pages[item.table + t / tiles_a_page] : 0; };
    for (int t = item.tile_begin; t < item.tile_end; ++t) {
      const int at = (t - item.tile_begin) & 31;
      if (at == 0) pages = page_of(t + lane);
      if (t < item.tile_begin + done) continue;
      const bool early = has_first && t - item.tile_begin < DecodePart::first_tiles;
      const int page = early ? __shfl_sync(~0u, first_page, at) : __shfl_sync(~0u, pages, at);
      const int y = row_of(t);
      if (elect_lane()) {
        if (at & 1)
          odd_tile(y, page);
        else
          even_tile(y, page);
      }
      __syncwarp();
      if (fetches && (at & 1)) fetch_pair(item, t + 1);
    }
  }
};

// A warpgroup's state and what it does with tiles.
template <class S>
struct DecodeGroup {
  static constexpr DecodeBlock<S> b{};
  int group, thread, warp, lane;  // of the warpgroup
  int row;                        // this thread's rows are row and row + 8, its columns 8 i + 2 (lane % 4) + {0, 1}
  uint32_t values_at;             // this warpgroup's columns, in bytes from a tile's first
  int parity[2] = {0, 0}, q_parity = 0, hand_parity = 0, clear_parity = 0;

  __device__ explicit DecodeGroup(int group_) : group(group_) {
    thread = int(threadIdx.x) & 127, warp = thread / 32, lane = thread & 31;
    row = warp * 16 + lane / 4;
    values_at = S::shared_box ? group * 64 : group * S::half_boxes * box_bytes;
  }

  // All lanes arrive here and where they hand over: the order is plain to the race checker then.
  __device__ void free(int tile, int half) const { barrier_arrive(&b.shared().empty[tile][half]); }

  // All columns.
  __device__ void wait_queries() const {
#pragma unroll  // with a loop here the main loop is up to 2% slower
    for (int box = 0; box < S::boxes; ++box) barrier_wait(&b.shared().q_full[box], q_parity);
  }

  // After an item's last scores: the next queries may come.
  __device__ void free_queries() {
    barrier_arrive(&b.shared().q_empty);
    q_parity ^= 1;
  }

  // s += Q Kᵀ over boxes [from, to); waits for the columns' Queries, too.
  template <bool Queries = false>
  __device__ void scores(float (&s)[32], int tile, int from, int to, bool first) const {
    const uint64_t q = wgmma_operand(shared_address(b.q())), keys = wgmma_operand(shared_address(b.k(tile)));
#pragma unroll 1
    for (int box = from; box < to; ++box) {  // rolled: a short kernel starts sooner from cold caches
      if (Queries) barrier_wait(&b.shared().q_full[box], q_parity);
      barrier_wait(&b.shared().full[tile][box], parity[tile]);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t offset = box * box_bytes + k * 32;
        wgmma<false>(s, wgmma_behind(q, offset), wgmma_behind(keys, offset), !(first && box == from && k == 0));
      }
    }
  }

  // This warpgroup's columns of the values; 16 tokens are step_bytes.
  static constexpr uint32_t step_bytes = 16 * 128;
  __device__ uint64_t value_operand(int tile) const { return wgmma_operand(shared_address(b.k(tile)) + values_at, box_bytes); }

  // o += P V with P in registers, or in the last box of its tile.
  __device__ void values(float (&o)[S::registers], const uint32_t (&p)[16], int tile) const {
    const uint64_t v = value_operand(tile);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<true>(o, p + 4 * k, wgmma_behind(v, k * step_bytes), 1);
  }
  __device__ void values(float (&o)[S::registers], int tile) const {
    const uint64_t v = value_operand(tile), p = wgmma_operand(shared_address(b.probabilities(tile)));
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<true>(o, wgmma_behind(p, k * 32), wgmma_behind(v, k * step_bytes), 1);
  }

  // Zeroes a tile's rows from `valid` on: what is there is not the sequence's, and 0 × NaN is NaN.
  __device__ void clear(int tile, int valid) {
    if (valid >= tile_tokens) return;
#pragma unroll 1  // rare, and among the loop's instructions
    for (int box = 0; box < S::boxes; ++box) {
      barrier_wait(&b.shared().full[tile][box], parity[tile]);
#pragma unroll 1
      for (int i = valid * 8 + thread; i < tile_tokens * 8; i += 128) reinterpret_cast<uint4*>(b.k(tile) + box * box_bytes)[i] = uint4{};
    }
    publish_shared();
    barrier_arrive(&b.shared().cleared[tile]);
    barrier_wait(&b.shared().cleared[tile], clear_parity);
    clear_parity ^= 1;
  }

  // Hands the probabilities and maxima of a tile to the other warpgroup.
  __device__ void hand_over(const uint32_t (&p)[16], const float (&m)[2], int tile) const {
    uint8_t* to = b.probabilities(tile) + (lane & 3) * 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = row + (i & 1) * 8, column = i / 4 * 2 + (i >> 1 & 1);  // in eights
      *reinterpret_cast<uint32_t*>(to + r * 128 + ((column ^ r) & 7) * 16) = p[i];
    }
    if ((lane & 3) == 0) b.shared().m[tile][row] = m[0], b.shared().m[tile][row + 8] = m[1];
    publish_shared();
    barrier_arrive(&b.shared().handed_over[tile]);
  }

  // Takes over the other warpgroup's maxima: what this one holds is brought to them.
  __device__ void take_over(float (&o)[S::registers], float (&m)[2], float (&l)[2], int tile) {
    barrier_wait(&b.shared().handed_over[tile], hand_parity);
    hand_parity ^= 1;
    const float next[2] = {b.shared().m[tile][row], b.shared().m[tile][row + 8]};
    const float factor[2] = {rescale(m[0], next[0]), rescale(m[1], next[1])};
    m[0] = next[0], m[1] = next[1];
    l[0] *= factor[0], l[1] *= factor[1];
    scale_rows(o, factor);
  }
};

// Tiles 0, 2, 4 … of an item; the first half of the values' columns. The scores of the next tile start behind the product with the odd one.
template <class S>
__device__ __forceinline__ void even_tiles(DecodeGroup<S>& g, const DecodeRows& rows, const DecodeItem& item, float (&o)[S::registers],
                                           float (&m)[2], float (&l)[2]) {
  float s[32], factor[2];
  uint32_t p[16];
  int t = item.tile_begin;
  if (t == item.tile_end) return g.wait_queries(), g.free_queries();
  g.clear(0, item.kv_count - t * tile_tokens);
  g.template scores<true>(s, 0, 0, S::boxes, true);
  wgmma_commit();
  wgmma_wait<0>();
  while (true) {
    g.parity[0] ^= 1;
    if (t + 2 >= item.tile_end) g.free_queries();
    softmax(s, rows, t * tile_tokens, m, l, factor, p);
    g.hand_over(p, m, 0);
    scale_rows(o, factor);
    wgmma_begin();
    g.values(o, p, 0);
    wgmma_commit();
    wgmma_wait<0>();
    g.free(0, 0);
    if (t + 1 == item.tile_end) return;
    g.take_over(o, m, l, 1);
    t += 2;
    if (t >= item.tile_end) break;
    wgmma_begin();
    g.values(o, 1);
    wgmma_commit();
    g.clear(0, item.kv_count - t * tile_tokens);
    g.scores(s, 0, 0, S::half_boxes, true);
    wgmma_commit();
    wgmma_wait<1>();
    g.free(1, 0);
    g.scores(s, 0, S::half_boxes, S::boxes, false);
    wgmma_commit();
    wgmma_wait<0>();
  }
  wgmma_begin();
  g.values(o, 1);
  wgmma_commit();
  wgmma_wait<0>();
  g.free(1, 0);
}

// Tiles 1, 3, 5 …; the second half of the values' columns.
template <class S>
__device__ __forceinline__ void odd_tiles(DecodeGroup<S>& g, const DecodeRows& rows, const DecodeItem& item, float (&o)[S::registers],
                                          float (&m)[2], float (&l)[2]) {
  float s[32], factor[2];
  uint32_t p[16];
  int t = item.tile_begin;
  g.wait_queries();
  if (t + 1 >= item.tile_end) g.free_queries();
  for (; t + 1 < item.tile_end; t += 2) {
    g.clear(1, item.kv_count - (t + 1) * tile_tokens);
    g.scores(s, 1, S::half_boxes, S::value_boxes, true);
    g.scores(s, 1, 0, S::half_boxes, S::shared_box);
    g.scores(s, 1, S::value_boxes, S::boxes, false);
    wgmma_commit();
    wgmma_wait<0>();
    g.parity[1] ^= 1;
    if (t + 3 >= item.tile_end) g.free_queries();
    g.take_over(o, m, l, 0);
    wgmma_begin();
    g.values(o, 0);
    wgmma_commit();
    softmax(s, rows, (t + 1) * tile_tokens, m, l, factor, p);
    g.hand_over(p, m, 1);
    wgmma_wait<0>();
    g.free(0, 1);
    if (S::shared_box) g.free(0, 0);
    scale_rows(o, factor);
    wgmma_begin();
    g.values(o, p, 1);
    wgmma_commit();
    wgmma_wait<0>();
    g.free(1, 1);
    if (S::shared_box) g.free(1, 0);
  }
  if (t == item.tile_end) return;
  g.take_over(o, m, l, 0);
  wgmma_begin();
  g.values(o, 0);
  wgmma_commit();
  wgmma_wait<0>();
  g.free(0, 1);
  if (S::shared_box) g.free(0, 0);
}

// A whole sequence's results: bf16 in 16-byte pieces, which the four lanes of a row exchange words for, or f32.
template <class S>
__device__ void store_whole(const DecodeGroup<S>& g, const DecodeCall& call, const DecodeItem& item, int first, float (&o)[S::registers],
                            const float (&scale)[2]) {
  const int t = g.lane & 3, column = g.group * S::columns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + g.row + 8 * i;
    const int64_t at = (int64_t(item.start) * call.n_h + row) * S::values + column;
    if (call.out_f32) {
      auto* to = static_cast<float*>(call.o) + at + 2 * t;
#pragma unroll
      for (int j = 0; j < S::columns / 8; ++j)
        if (row < item.rows) *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * i] * scale[i], o[4 * j + 2 * i + 1] * scale[i]};
      continue;
    }
    auto* to = static_cast<__nv_bfloat16*>(call.o) + at + 8 * t;
#pragma unroll
    for (int j = 0; j < S::columns / 8; j += 4) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) word[k] = bf16_pair(o[4 * (j + k) + 2 * i] * scale[i], o[4 * (j + k) + 2 * i + 1] * scale[i]);
      transpose_quad(word, t);
      if (row < item.rows) *reinterpret_cast<uint4*>(to + 8 * j) = {word[0], word[1], word[2], word[3]};
    }
  }
}

// Stores what a warp has of a piece, as the registers hold it.
template <class S>
__device__ void store_piece(const DecodeGroup<S>& g, const DecodeArguments& a, const DecodeItem& item, int first,
                            const float (&o)[S::registers], const float (&m)[2], const float (&l)[2]) {
  const int slab = first / slab_rows + g.warp, sixteen = g.group * S::columns / 16;
  if (slab * slab_rows >= item.rows) return;
  uint4* to = a.partial.o + partial_at(a.call.plan, item, item.piece, slab, sixteen, S::values) + g.lane;
#pragma unroll
  for (int j = 0; j < S::registers; j += 8, to += item.pieces * 32)
    *to = {bf16_pair(o[j], o[j + 1]), bf16_pair(o[j + 4], o[j + 5]), bf16_pair(o[j + 2], o[j + 3]), bf16_pair(o[j + 6], o[j + 7])};
  float* sums = a.partial.sums + partial_sums_at(a.call.plan, item, item.piece, slab) + g.lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(l[i]);
    if ((g.lane & 3) != 0) continue;
    sums[DecodePartials::share + g.group * slab_rows + 8 * i] = sum;
    if (g.group == 0) sums[DecodePartials::reference + 8 * i] = m[i];
  }
}

// Sums the warpgroups' shares, divides and stores this warpgroup's half of a whole sequence's columns.
template <class S>
__device__ void store_rows(const DecodeGroup<S>& g, const DecodeArguments& a, const DecodeItem& item, int first, float (&o)[S::registers],
                           const float (&m)[2], float (&l)[2], int turn) {
  auto& share = g.b.shared().l[turn];
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    l[i] = quad_sum(l[i]);
    if ((g.lane & 3) == 0) share[g.group][g.row + 8 * i] = l[i];
  }
  barrier_arrive(&g.b.shared().summed);
  barrier_wait(&g.b.shared().summed, turn);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = g.row + 8 * i, place = first + row;
    const float sum = share[0][row] + share[1][row];
    scale[i] = sum > 0 ? 1 / sum : 0;
    if (g.group == 0 && (g.lane & 3) == 0 && place < item.rows)
      a.call.lse[int64_t(item.start) * a.call.n_h + place] = sum > 0 ? (m[i] + log2f(sum)) * ln_2 : -INFINITY;
  }
  store_whole(g, a.call, item, first, o, scale);
}

template <class S>
__device__ void init_barriers() {
  constexpr DecodeBlock<S> b{};
  if (shared_address(decode_memory) % 1024 != 0) __trap();  // swizzles count from there
  for (int box = 0; box < S::boxes; ++box) barrier_init(&b.shared().q_full[box], 1);
  for (int tile = 0; tile < 2; ++tile) {
    for (int box = 0; box < S::boxes; ++box) barrier_init(&b.shared().full[tile][box], !S::codes ? 1 : box == S::boxes - 1 ? 128 : 64);
    barrier_init(&b.shared().empty[tile][0], S::shared_box ? 256 : 128);
    barrier_init(&b.shared().empty[tile][1], 128);
    barrier_init(&b.shared().handed_over[tile], 128);
    barrier_init(&b.shared().cleared[tile], 128);
  }
  barrier_init(&b.shared().q_empty, 256);
  barrier_init(&b.shared().summed, 256);
  barrier_init_done();
}

template <class S>
__global__ void __launch_bounds__(decode_threads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap kv_map,
                  const __grid_constant__ DecodeArguments a) {
  static_assert(3 * S::tile_bytes + sizeof(DecodeShared<S>) <= S::shared_bytes);
  constexpr DecodeBlock<S> b{};
  const DecodePart& part = a.call.plan.parts[blockIdx.y];
  const int first = int(blockIdx.x) * block_rows, lane = int(threadIdx.x) & 31;
  const int first_page = lane < DecodePart::first_tiles ? part.page[lane] : 0;
  DecodeItem item = part.first;
  const int begin = part.begin, end = part.end;
  if (threadIdx.x == 256) {
    prefetch_map(&q_map);
    prefetch_map(&kv_map);
    init_barriers<S>();
  }
  __syncthreads();
  begin_kernel(true);  // queries and cache rows are there

  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  if (group == 2) {
    give_registers<S::loader_registers>();
    const int warp = int(threadIdx.x) / 32 - 8;
    DecodeLoader<S> loader(&q_map, &kv_map, a.call, streams_by(part.tiles, S::tile_bytes));
    if (!S::codes && warp == 1) loader.q_parity = 0;
    [[maybe_unused]] CodeLoader<S> codes(a.call);
    bool early = true;  // the first queries go before the first tiles or with them, later ones beside them
    for (int i = begin; i < end && (S::codes || warp < 2); ++i) {
      if (i > begin) item = a.call.plan.items[i];
      if (first >= item.rows) continue;
      const bool with_tile = !S::codes && i == begin && item.tile_begin < item.tile_end;
      if (with_tile && warp == 0)
        loader.queries_beside_tile(item, first, loader.row_of(item.tile_begin), __shfl_sync(~0u, first_page, 0));
      else if (warp == (S::codes || early ? 0 : 1))
        loader.queries(item, first);
      early = false;
      if constexpr (S::codes)
        codes.tiles(item, i == begin, first_page);
      else if (warp == 0)
        loader.tiles(item, i == begin, first_page, with_tile ? 1 : 0);
    }
  } else {
    take_registers<S::group_registers>();
    DecodeGroup<S> g(group);
    int turn = 0;
    for (int i = begin; i < end; ++i) {
      if (i > begin) item = a.call.plan.items[i];
      if (first >= item.rows) continue;
      const DecodeRows rows(item, first + g.row, a.call.n_h, lane, a.call.scale);
      float o[S::registers], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < S::registers; ++j) o[j] = 0;
      if (group == 0)
        even_tiles(g, rows, item, o, m, l);
      else
        odd_tiles(g, rows, item, o, m, l);
      if (item.slot < 0)
        store_rows(g, a, item, first, o, m, l, turn), turn ^= 1;
      else
        store_piece(g, a, item, first, o, m, l);
      __syncwarp();  // else the compiler takes the warps of later items for diverged, and keeps what is uniform in every lane
    }
  }
}

}  // namespace mla::cuda
