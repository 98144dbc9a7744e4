// How absorbed decode loads a cache of f8: a warpgroup reads codes, and leaves bf16 in shared memory as the copy engine would.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/decode_shared.cuh"

namespace mla::cuda {

// A tile goes in five units: 32 rows of a half of its boxes each, and the rotary part. A warp reads 256 bytes of a row at a time, 16 a
// lane. The next unit is on its way to registers while one is stored; whole tiles are asked for into the second-level cache before.
template <class S>
struct CodeLoader {
  static constexpr DecodeBlock<S> b{};
  static constexpr KvFormat format{KvLayout::mla(S::values, S::boxes * 64 - S::values), DType::f8};
  static constexpr int row_bytes = int(format.row_bytes()), kept_offset = int(format.kept_offset()),
                       scale_offset = int(format.scale_offset());
  static constexpr int unit_rows = 32;
  static_assert(!S::codes || (S::values == 512 && S::boxes == 9 && row_bytes == 656));

  struct Unit {
    uint4 piece[4];
    float scale[4];
  };

  const DecodeCall& call;
  int thread, lane, tiles_a_page;
  int row, column;         // of a half's first unit: rows are row + 8 i, the column counts 16 codes
  int parity[2] = {1, 1};  // of the emptiness that is waited for

  __device__ explicit CodeLoader(const DecodeCall& c)
      : call(c), thread(int(threadIdx.x) & 127), lane(thread & 31), tiles_a_page(c.kv.page_tokens / tile_tokens) {
    row = thread / 16, column = thread & 15;
  }

  __device__ const std::byte* tile_at(int t, int page) const {
    return call.kv.base + page * call.kv.page_bytes + t % tiles_a_page * (tile_tokens * row_bytes);
  }

  __device__ void load(Unit& u, const std::byte* from, int half, int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::byte* at = from + (first + row + 8 * i) * row_bytes;
      u.piece[i] = *reinterpret_cast<const uint4*>(at + half * 256 + column * 16);
      u.scale[i] = *reinterpret_cast<const float*>(at + scale_offset + (half * 2 + column / 8) * 4);
    }
  }
  __device__ void load_rotary(Unit& u, const std::byte* from) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      u.piece[i] = *reinterpret_cast<const uint4*>(from + (thread / 8 + 16 * i) * row_bytes + kept_offset + thread % 8 * 16);
  }

  __device__ uint4* place(int tile, int box, int r, int chunk) const {
    return reinterpret_cast<uint4*>(b.k(tile) + box * box_bytes + r * 128 + ((chunk ^ r) & 7) * 16);
  }
  // What this thread wrote of a box is there.
  __device__ void full(int tile, int box) const {
    publish_shared();
    barrier_arrive(&b.shared().full[tile][box]);
  }
  __device__ void store(const Unit& u, int tile, int half, int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 by = __float2bfloat162_rn(u.scale[i] * 0x1p120f);
      const uint32_t code[4] = {u.piece[i].x, u.piece[i].y, u.piece[i].z, u.piece[i].w};
      uint4 y[2];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        y[j] = {scale_pair(widen_codes(__byte_perm(code[2 * j], 0, 0x1404)), by),
                scale_pair(widen_codes(__byte_perm(code[2 * j], 0, 0x3424)), by),
                scale_pair(widen_codes(__byte_perm(code[2 * j + 1], 0, 0x1404)), by),
                scale_pair(widen_codes(__byte_perm(code[2 * j + 1], 0, 0x3424)), by)};
      // Lanes of neighbouring boxes take their chunks in turns: eight lanes write to all banks.
      const int r = first + row + 8 * i, box = half * 4 + column / 4, chunk = column % 4 * 2, turn = column / 4 & 1;
      *place(tile, box, r, chunk + turn) = turn ? y[1] : y[0];
      *place(tile, box, r, chunk + 1 - turn) = turn ? y[0] : y[1];
    }
    full(tile, half * 4 + column / 4);
  }
  __device__ void store_rotary(const Unit& u, int tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) *place(tile, S::boxes - 1, thread / 8 + 16 * i, thread % 8) = u.piece[i];
    full(tile, S::boxes - 1);
  }

  // One tile, whose first unit is in `u`; leaves the first unit of the next, at `next`, in `v`. An odd tile begins with its second half.
  template <int Tile>
  __device__ void tile(Unit& u, Unit& v, const std::byte* from, const std::byte* next) {
    load(v, from, Tile, unit_rows);
    barrier_wait(&b.shared().empty[Tile][Tile], parity[Tile]);
    store(u, Tile, Tile, 0);
    load(u, from, 1 - Tile, 0);
    store(v, Tile, Tile, unit_rows);
    load(v, from, 1 - Tile, unit_rows);
    barrier_wait(&b.shared().empty[Tile][1 - Tile], parity[Tile]);
    store(u, Tile, 1 - Tile, 0);
    load_rotary(u, from);
    store(v, Tile, 1 - Tile, unit_rows);
    if (next) load(v, next, 1 - Tile, 0);
    store_rotary(u, Tile);
    parity[Tile] ^= 1;
  }

  // `first_page`: a part's first item has its first pages here, one a lane.
  __device__ void tiles(const DecodeItem& item, bool has_first, int first_page) {
    if (item.tile_begin == item.tile_end) return;
    int pages = 0;
    auto page_of = [&](int t) {
      const int at = (t - item.tile_begin) & 31;
      if (at == 0) pages = t + lane < item.tile_end ? call.plan.pages[item.table + (t + lane) / tiles_a_page] : 0;
      const bool early = has_first && t - item.tile_begin < DecodePart::first_tiles;
      return early ? __shfl_sync(~0u, first_page, at) : __shfl_sync(~0u, pages, at);
    };
    int asked = item.tile_begin;
    // Where the next tile begins, which is asked for on the way to the second-level cache.
    auto ask = [&]() -> const std::byte* {
      if (asked == item.tile_end) return nullptr;
      const std::byte* from = tile_at(asked, page_of(asked));
      for (int at = thread * 128; at < tile_tokens * row_bytes; at += 128 * 128) prefetch_l2(from + at);
      ++asked;
      return from;
    };
    const std::byte *here = ask(), *next = ask();
    Unit u, v;
    load(u, here, 0, 0);
    while (true) {
      tile<0>(u, v, here, next);
      here = next, next = ask();
      if (!here) return;
      tile<1>(v, u, here, next);
      here = next, next = ask();
      if (!here) return;
    }
  }
};

}  // namespace mla::cuda
