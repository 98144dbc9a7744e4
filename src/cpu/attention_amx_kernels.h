// Attention, form "lanes", on the tiles of AMX, in bf16. Both products come out as the lanes want them: scores [16 rows][16 lanes] =
// keys · queries, keys where they lie in the cache; sums [16 elements][16 lanes] = transposed values · weights.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_lanes_kernels.h"
#include "cpu/transpose_values.h"

namespace mla {
namespace {

inline bool fits_tiles(const KvFormat& f) { return f.type != DType::f32 && f.layout.d_k % 32 == 0 && f.layout.d_v % 32 == 0; }

// Sixteen keys, `step` bytes apart.
struct TileKeys {
  const uint16_t* at;
  int64_t step;
};

// Keys from `first` on, where they lie if they are sixteen and evenly apart, else in `room`, with zeros beyond the last.
inline TileKeys take_keys(const LaneTile<InBf16>& tile, int first, int64_t d_k, uint16_t* room) {
  const uint16_t* const* key = tile.key + first;
  const int n = tile.n - first < 16 ? tile.n - first : 16;
  const int64_t step = n == 16 ? key[1] - key[0] : 0;
  bool even = n == 16;
  for (int i = 2; i < n; ++i) even = even && key[i] - key[i - 1] == step;
  if (even) return {key[0], step * int64_t(sizeof(uint16_t))};
  for (int i = 0; i < 16; ++i) {
    if (i < n)
      std::memcpy(room + i * d_k, key[i], size_t(d_k) * sizeof(uint16_t));
    else
      std::memset(room + i * d_k, 0, size_t(d_k) * sizeof(uint16_t));
  }
  return {room, d_k * int64_t(sizeof(uint16_t))};
}

// The registers, few (linear_amx_kernels.h says why): two sums, a tile that changes with each product, and what two products share.
constexpr int first_sum = 0, second_sum = 1, own_tile = 2, shared_tile = 3;

// scores of 32 rows (two tiles of keys) and a vector; `next`, where not null, are 32 rows to fetch meanwhile.
inline void score_tiles(const TileKeys* keys, const uint16_t* q, int64_t d_k, const uint16_t* const* next, float* scores) {
  zero_tile<first_sum>(), zero_tile<second_sum>();
  for (int64_t d = 0; d < d_k; d += 32) {
    if (next)
#pragma GCC unroll 32
      for (int r = 0; r < 32; ++r) __builtin_prefetch(next[r] + d, 0, 2);
    load_tile_at<shared_tile>(q + d * 16, 64);
    load_tile_at<own_tile>(keys[0].at + d, keys[0].step);
    dot_tiles_bf16<first_sum, own_tile, shared_tile>();
    load_tile_at<own_tile>(keys[1].at + d, keys[1].step);
    dot_tiles_bf16<second_sum, own_tile, shared_tile>();
  }
  store_tile_at<first_sum>(scores, 64);
  store_tile_at<second_sum>(scores + 256, 64);
}

// o[d] += Σ_t values[d][t] · weights[t] of a vector, for `padded` rows.
inline void sum_tiles(const uint16_t* values, int64_t d_v, const uint16_t* weights, int padded, float* o) {
  for (int64_t d = 0; d < d_v; d += 32) {
    load_tile_at<first_sum>(o + d * 16, 64);
    load_tile_at<second_sum>(o + d * 16 + 256, 64);
    for (int t = 0; t < padded; t += 32) {
      load_tile_at<shared_tile>(weights + t * 16, 64);
      load_tile_at<own_tile>(values + d * attention_tile + t, attention_tile * sizeof(uint16_t));
      dot_tiles_bf16<first_sum, own_tile, shared_tile>();
      load_tile_at<own_tile>(values + (d + 16) * attention_tile + t, attention_tile * sizeof(uint16_t));
      dot_tiles_bf16<second_sum, own_tile, shared_tile>();
    }
    store_tile_at<first_sum>(o + d * 16, 64);
    store_tile_at<second_sum>(o + d * 16 + 256, 64);
  }
}

inline void attend_lanes_amx(const AttentionUnit& u) {
  constexpr int tile_floats = attention_tile * 16;
  const KvLayout& l = u.kv->format.layout;
  const int vectors = (u.rows + 15) / 16;
  const int64_t q_vector = int64_t(l.d_k) * 16, wide = l.d_k > l.d_v ? l.d_k : l.d_v, state = lanes_state(l);
  const WholeTiles tiles;
  LaneTile<InBf16> tile;
  Weights<uint16_t> weights;
  auto* scores = reinterpret_cast<float*>(u.scratch);
  weights.panel = reinterpret_cast<uint16_t*>(scores + attention_vectors * tile_floats);
  auto* q = weights.panel + attention_vectors * tile_floats;
  uint16_t* room = q + attention_vectors * q_vector;  // copies of keys and values, those of load_tile and of take_keys
  uint16_t* key_room = room + 2 * attention_tile * wide;
  uint16_t* values = key_room + attention_tile * l.d_k;
  for (int v = 0; v < vectors; ++v) {
    start_lanes(u.state + v * state, l);
    pack_queries(u, u.first + 16 * v, q + v * q_vector);
  }
  const Range seen = visible_rows(u, u.first, u.first + u.rows - 1);
  for (int from = seen.from; from < seen.to; from += attention_tile) {
    const int n = seen.to - from < attention_tile ? seen.to - from : attention_tile;
    const int left = seen.to - from - n, next = left < attention_tile ? left : attention_tile;
    const int padded = int(round_up(n, 32));
    load_tile<InBf16>(u, from, n, next, room, tile);
    const int64_t start = int64_t(u.span->kv_position) + from;
    TileKeys keys[attention_tile / 16];
    for (int t = 0; t < padded; t += 16) keys[t / 16] = take_keys(tile, t, l.d_k, key_room + t * l.d_k);
    transpose_values(tile, padded, l.d_v, values);

    bool fetch = tile.ahead && n == attention_tile;
    bool partial[attention_vectors];
    for (int v = 0; v < vectors; ++v) {
      const Sight sight = sight_of(u, start, n, v, 1);
      weights.seen[v] = sight.any, partial[v] = sight.partial;
      if (!sight.any) continue;
      for (int t = 0; t < padded; t += 32)
        score_tiles(keys + t / 16, q + v * q_vector, l.d_k, fetch ? tile.next_key + t : nullptr, scores + v * tile_floats + t * 16);
      fetch = false;
    }
    for (int v = 0; v < vectors; ++v) {
      if (!weights.seen[v]) continue;
      float *const s = scores + v * tile_floats, *const sums = u.state + v * state, *const o = sums + 32;
      if (partial[v]) mask_tile(u, u.first + v * 16, start, n, s);
      const f32x16 shrink = softmax_tile(s, n, padded, sums, weights.panel + v * tile_floats);
      if (top(abs(shrink - splat(1))) != 0)
        for (int64_t d = 0; d < l.d_v; ++d) store(o + d * 16, shrink * load(o + d * 16));
      sum_tiles(values, l.d_v, weights.panel + v * tile_floats, padded, o);
    }
  }
}

}  // namespace
}  // namespace mla
