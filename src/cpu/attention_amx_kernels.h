// Attention, form "lanes", on the tiles of AMX, in bf16. Both products come out as the lanes want them: scores [16 rows][16 lanes] =
// keys · queries, keys where they lie in the cache; sums [16 elements][16 lanes] = transposed values · weights.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_lanes_kernels.h"

namespace mla {
namespace {

inline bool fits_tiles(const KvLayout& l) { return l.d_k % 32 == 0 && l.d_v % 32 == 0; }

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

// scores of 32 rows (two tiles of keys) and one or two vectors; `next`, where not null, are 32 rows to fetch meanwhile.
template <int C>
inline void score_tiles(const TileKeys* keys, const uint16_t* q, int64_t q_vector, int64_t d_k, const uint16_t* const* next,
                        float* scores) {
  zero_tile<0>(), zero_tile<1>();
  if constexpr (C == 2) zero_tile<2>(), zero_tile<3>();
  for (int64_t d = 0; d < d_k; d += 32) {
    if (next)
#pragma GCC unroll 32
      for (int r = 0; r < 32; ++r) __builtin_prefetch(next[r] + d, 0, 2);
    load_tile_at<4>(keys[0].at + d, keys[0].step);
    load_tile_at<6>(q + d * 16, 64);
    dot_tiles_bf16<0, 4, 6>();
    load_tile_at<5>(keys[1].at + d, keys[1].step);
    dot_tiles_bf16<1, 5, 6>();
    if constexpr (C == 2) {
      load_tile_at<7>(q + q_vector + d * 16, 64);
      dot_tiles_bf16<2, 4, 7>();
      dot_tiles_bf16<3, 5, 7>();
    }
  }
  store_tile_at<0>(scores, 64);
  store_tile_at<1>(scores + 256, 64);
  if constexpr (C == 2) {
    store_tile_at<2>(scores + attention_tile * 16, 64);
    store_tile_at<3>(scores + attention_tile * 16 + 256, 64);
  }
}

// values [d_v][attention_tile] = the values of a tile, zeros beyond the last up to `padded` rows, a multiple of 32.
inline void transpose_values(const LaneTile<InBf16>& tile, int padded, int64_t d_v, uint16_t* values) {
  const __m512i none = _mm512_setzero_si512();
  for (int from = 0; from < padded; from += 32)
    for (int64_t d = 0; d < d_v; d += 32)
      for (int odd = 0; odd < 2; ++odd) {
        f32x16 pairs[16];  // lane j: element d + 2j + odd of two rows
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int t = from + 2 * i;
          const __m512i x = t < tile.n ? _mm512_loadu_si512(tile.value[t] + d) : none;
          const __m512i y = t + 1 < tile.n ? _mm512_loadu_si512(tile.value[t + 1] + d) : none;
          pairs[i].v = _mm512_castsi512_ps(odd ? _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y)
                                               : _mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16)));
        }
        transpose(pairs);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) _mm512_store_ps(values + (d + 2 * j + odd) * attention_tile + from, pairs[j].v);
      }
}

// o[c][d] += Σ_t values[d][t] · weights[c][t] of one or two vectors, for `padded` rows.
template <int C>
inline void sum_tiles(const uint16_t* values, int64_t d_v, const uint16_t* weights, int padded, float* const* o) {
  for (int64_t d = 0; d < d_v; d += 32) {
    load_tile_at<0>(o[0] + d * 16, 64);
    load_tile_at<1>(o[0] + d * 16 + 256, 64);
    if constexpr (C == 2) load_tile_at<2>(o[1] + d * 16, 64), load_tile_at<3>(o[1] + d * 16 + 256, 64);
    for (int t = 0; t < padded; t += 32) {
      load_tile_at<4>(values + d * attention_tile + t, attention_tile * sizeof(uint16_t));
      load_tile_at<6>(weights + t * 16, 64);
      dot_tiles_bf16<0, 4, 6>();
      load_tile_at<5>(values + (d + 16) * attention_tile + t, attention_tile * sizeof(uint16_t));
      dot_tiles_bf16<1, 5, 6>();
      if constexpr (C == 2) {
        load_tile_at<7>(weights + attention_tile * 16 + t * 16, 64);
        dot_tiles_bf16<2, 4, 7>();
        dot_tiles_bf16<3, 5, 7>();
      }
    }
    store_tile_at<0>(o[0] + d * 16, 64);
    store_tile_at<1>(o[0] + d * 16 + 256, 64);
    if constexpr (C == 2) store_tile_at<2>(o[1] + d * 16, 64), store_tile_at<3>(o[1] + d * 16 + 256, 64);
  }
}

// Calls f.template operator()<C>(first) for pairs of vectors and a single last one.
template <class F>
inline void for_pairs(int vectors, F f) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2) f.template operator()<2>(v);
  if (v < vectors) f.template operator()<1>(v);
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

    const bool ahead = tile.ahead && n == attention_tile;
    for_pairs(vectors, [&]<int C>(int v) {
      const Sight sight = sight_of(u, start, n, v, C);
      weights.seen[v] = sight.any;
      if (!sight.any) return;
      float* s = scores + v * tile_floats;
      for (int t = 0; t < padded; t += 32)
        score_tiles<C>(keys + t / 16, q + v * q_vector, q_vector, l.d_k, ahead && v == 0 ? tile.next_key + t : nullptr, s + t * 16);
    });
    for_pairs(vectors, [&]<int C>(int v) {
      if (!weights.seen[v]) return;
      const Sight sight = sight_of(u, start, n, v, C);
      float* o[C];
      for (int c = 0; c < C; ++c) {
        float* s = scores + (v + c) * tile_floats;
        if (sight.partial) mask_tile(u, u.first + (v + c) * 16, start, n, s);
        float* const sums = u.state + (v + c) * state;
        const f32x16 shrink = softmax_tile(s, n, padded, sums, weights.panel + (v + c) * tile_floats);
        o[c] = sums + 32;
        if (top(abs(shrink - splat(1))) == 0) continue;
        for (int64_t d = 0; d < l.d_v; ++d) store(o[c] + d * 16, shrink * load(o[c] + d * 16));
      }
      sum_tiles<C>(values, l.d_v, weights.panel + v * tile_floats, padded, o);
    });
  }
}

}  // namespace
}  // namespace mla
