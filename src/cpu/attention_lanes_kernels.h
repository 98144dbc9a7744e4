// Attention, form "lanes": query rows are the lanes of a vector and the softmax is vertical, so that prefill, absorbed decode and every
// head count are one kernel. Keys are read where they lie in the cache; a tile serves the scores and the sums of all queries of a unit.
#pragma once

#include "cpu/attention_rows_kernels.h"

namespace mla {
namespace {

// How the products run: whole f32, or pairs of bf16 summed in f32. A panel is [steps][16 lanes][depth].
struct InF32 {
  using Element = float;
  static constexpr int depth = 1;
  static f32x16 panel(const float* p) { return load(p); }
  static f32x16 spread(const float* p) { return splat(*p); }
  static f32x16 dot(f32x16 acc, f32x16 a, f32x16 b) { return fma(a, b, acc); }
};
struct InBf16 {
  using Element = uint16_t;
  static constexpr int depth = 2;
  static bf16x32 panel(const uint16_t* p) { return load_bf16x32(p); }
  static bf16x32 spread(const uint16_t* p) { return splat_bf16_pair(p); }
  static f32x16 dot(f32x16 acc, bf16x32 a, bf16x32 b) { return dot_bf16(acc, a, b); }
};

// Steps of a panel whose keys fill one cache line.
template <class In>
constexpr int64_t line_steps = 64 / int64_t(sizeof(typename In::Element)) / In::depth;

// scores[c][r] = Σ_step q[c][step] · keys[r][step] for R rows and C vectors; `next` are rows to fetch meanwhile, or null.
template <class In, int R, int C, class T = typename In::Element>
inline void score_block(const T* q, int64_t q_vector, int64_t steps, const T* const* keys, const T* const* next, float* scores) {
  f32x16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = zero_f32();
  const T* key[R];
  for (int r = 0; r < R; ++r) key[r] = keys[r];
  for (int64_t line = 0; line < steps; line += line_steps<In>) {
    if (next)
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + line * In::depth, 0, 2);
    const int64_t end = line + line_steps<In> < steps ? line + line_steps<In> : steps;
    for (int64_t s = line; s < end; ++s) {
      decltype(In::panel(q)) vector[C];
      for (int c = 0; c < C; ++c) vector[c] = In::panel(q + c * q_vector + s * 16 * In::depth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto element = In::spread(key[r] + s * In::depth);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = In::dot(acc[r][c], vector[c], element);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(scores + c * attention_tile * 16 + r * 16, acc[r][c]);
}

// A tile of the context as the products read it.
template <class In>
struct LaneTile {
  using T = typename In::Element;
  const T* key[attention_tile];       // rows padded to a multiple of 8 with the last one
  const T* next_key[attention_tile];  // of the tile that follows; valid if `ahead`
  const T* value[attention_tile];
  bool ahead;
  int n, padded;
};

// Values of a tile for 32 elements: in f32 the rows themselves, in bf16 copies [2][attention_tile / 2][16][2] with two rows side by side.
template <class In>
struct ValueColumns {
  using T = typename In::Element;
  const T* const* value;
  int64_t first;
  T pairs[In::depth == 1 ? 1 : attention_tile * 32];

  void take(const LaneTile<In>& tile, int64_t d) {
    value = tile.value, first = d;
    if constexpr (In::depth == 2) {
      for (int t = 0; t < tile.n; t += 2) {
        const bf16x32 x = load_bf16x32(value[t] + d), y = load_bf16x32(value[t + 1 < tile.n ? t + 1 : t] + d);
        store_bf16x32(pairs + t * 16, interleave_low(x, y));
        store_bf16x32(pairs + (attention_tile + t) * 16, interleave_high(x, y));
      }
    }
  }
  const T* at(int64_t step, int64_t d) const {
    if constexpr (In::depth == 1) return value[step] + d;
    return pairs + ((d - first) / 16 * attention_tile / 2 + step) * 32 + d % 16 * 2;
  }
};

// o[c][d + i] = o[c][d + i] · shrink[c] + Σ_step weights[c][step] · values[step][d + i] for D elements and C vectors.
template <class In, int D, int C, class T = typename In::Element>
inline void value_block(const T* weights, int64_t steps, const ValueColumns<In>& values, int64_t d, const float* shrink, float* const* o) {
  f32x16 acc[D][C];
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < C; ++c) acc[i][c] = load(o[c] + (d + i) * 16) * load(shrink + 16 * c);
  for (int64_t s = 0; s < steps; ++s) {
    decltype(In::panel(weights)) vector[C];
    for (int c = 0; c < C; ++c) vector[c] = In::panel(weights + c * attention_tile * 16 + s * 16 * In::depth);
    const T* value = values.at(s, d);
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) {
      const auto element = In::spread(value + i * In::depth);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[i][c] = In::dot(acc[i][c], vector[c], element);
    }
  }
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < C; ++c) store(o[c] + (d + i) * 16, acc[i][c]);
}

inline void put_panel(float* panel, f32x16 even, f32x16 odd) { store(panel, even), store(panel + 16, odd); }
inline void put_panel(uint16_t* panel, f32x16 even, f32x16 odd) { store_bf16x32(panel, pair_bf16(even, odd)); }

// Query rows [first, first + 16) as a panel, times scale; lanes beyond the unit's rows are zeros.
template <class T>
inline void pack_queries(const AttentionUnit& u, int first, T* panel) {
  const int d_k = u.kv->format.layout.d_k;
  const float* row[16];
  const int rows = u.first + u.rows - first < 16 ? u.first + u.rows - first : 16;
  for (int i = 0; i < rows; ++i) row[i] = query_row(u, u.head, first + i);
  const f32x16 scale = splat(u.scale);
  for (int d = 0; d < d_k; d += 16) {
    f32x16 block[16];
    for (int i = 0; i < 16; ++i) block[i] = i >= rows ? zero_f32() : scale * (d_k - d < 16 ? load(row[i] + d, d_k - d) : load(row[i] + d));
    transpose(block);
    for (int i = 0; i < 16; i += 2) put_panel(panel + (d + i) * 16, block[i], block[i + 1]);
  }
}

// The softmax of a tile: scores [n padded][16] become weights (a panel of T, in place for f32), top and total move on. Returns by how
// much the sums so far shrink. Rows at and beyond n weigh nothing.
template <class T>
inline f32x16 softmax_tile(float* scores, int n, int padded, float* top_total, T* weights) {
  const float none = -__builtin_inff();
  for (int t = n; t < padded; ++t) store(scores + t * 16, splat(none));
  const f32x16 before = load(top_total);
  f32x16 most = before, other = before;
  for (int t = 0; t < padded; t += 2) most = max(most, load(scores + t * 16)), other = max(other, load(scores + t * 16 + 16));
  most = max(most, other);
  // Where nothing was seen yet the top is -inf: any finite number does for the differences.
  const f32x16 base = where_less(splat(none), most, most, zero_f32());
  f32x16 even = zero_f32(), odd = zero_f32();
  for (int t = 0; t < padded; t += 2) {
    const f32x16 p = exp(load(scores + t * 16) - base), q = exp(load(scores + t * 16 + 16) - base);
    even = even + p, odd = odd + q;
    put_panel(weights + t * 16, p, q);
  }
  const f32x16 shrink = exp(before - base);
  store(top_total, most);
  store(top_total + 16, fma(load(top_total + 16), shrink, even + odd));
  return shrink;
}

// Lanes [first, first + 16) of a tile of n rows that starts at position `start`: scores of rows a lane may not see become -inf.
inline void mask_tile(const AttentionUnit& u, int first, int64_t start, int n, float* scores) {
  float last[16], earliest[16];
  for (int i = 0; i < 16; ++i) {
    const int64_t at = query_position(u, first + i) - start, edge = u.mask.window > 0 ? at - u.mask.window + 1 : 0;
    last[i] = float(!u.mask.causal || at > n ? n : at < -1 ? -1 : at);
    earliest[i] = float(edge < 0 ? 0 : edge > n ? n : edge);
  }
  const f32x16 none = splat(-__builtin_inff()), to = load(last), from = load(earliest);
  for (int t = 0; t < n; ++t) {
    const f32x16 at = splat(float(t)), s = load(scores + t * 16);
    store(scores + t * 16, where_less(to, at, none, where_less(at, from, none, s)));
  }
}

// Whether any lane of C vectors sees any of a tile of n rows that starts at position `start`, and whether some see a part of it.
struct Sight {
  bool any, partial;
};
inline Sight sight_of(const AttentionUnit& u, int64_t start, int n, int vector, int C) {
  const int first = u.first + vector * 16, rows = u.first + u.rows - first < 16 * C ? u.first + u.rows - first : 16 * C;
  const int64_t low = query_position(u, first), high = query_position(u, first + rows - 1);
  return {!(u.mask.causal && start > high) && !(u.mask.window > 0 && start + n <= low - u.mask.window + 1),
          (u.mask.causal && start + n - 1 > low) || (u.mask.window > 0 && start <= high - u.mask.window)};
}

// A state that has seen nothing.
inline void start_lanes(float* state, const KvLayout& layout) {
  store(state, splat(-__builtin_inff()));
  std::memset(state + 16, 0, size_t(lanes_state(layout) - 16) * sizeof(float));
}

// What the vectors of a unit bring to a tile's values: their weights, panels [C][attention_tile][16], and by how much their sums shrink.
template <class T>
struct Weights {
  T* panel;  // [attention_vectors][attention_tile][16]
  float shrink[attention_vectors][16];
  bool seen[attention_vectors];  // false: no lane sees any of the tile
};

// Scores and softmax of C vectors of query rows, from `vector` on.
template <class In, int C, class T = typename In::Element>
inline void weigh_group(const AttentionUnit& u, const LaneTile<In>& tile, int64_t start, int vector, const T* q, float* scores,
                        Weights<T>& w) {
  constexpr int R = vector_registers < 32 ? 4 : C < 4 ? 8 : 4;
  const KvLayout& l = u.kv->format.layout;
  const int64_t q_vector = round_up(l.d_k, 32) * 16, steps = (l.d_k + In::depth - 1) / In::depth;
  const Sight sight = sight_of(u, start, tile.n, vector, C);
  w.seen[vector] = sight.any;
  if (!sight.any) return;

  const bool fetch = vector == 0 && tile.ahead;
  for (int r = 0; r < tile.padded; r += R)
    score_block<In, R, C>(q + vector * q_vector, q_vector, steps, tile.key + r, fetch ? tile.next_key + r : nullptr, scores + r * 16);
  for (int c = 0; c < C; ++c) {
    float* s = scores + c * attention_tile * 16;
    if (sight.partial) mask_tile(u, u.first + (vector + c) * 16, start, tile.n, s);
    store(w.shrink[vector + c],
          softmax_tile(s, tile.n, tile.padded, u.state + (vector + c) * lanes_state(l), w.panel + (vector + c) * attention_tile * 16));
  }
}

// Adds elements [d, d + 16) or [d, d + 32) of the values to the sums of C vectors.
template <class In, int C, class T = typename In::Element>
inline void sum_group(const AttentionUnit& u, const ValueColumns<In>& values, int64_t steps, int64_t d, int64_t end, int vector,
                      const Weights<T>& w) {
  constexpr int D = (vector_registers < 32 ? 4 : 16) / C;
  if (!w.seen[vector]) return;
  float* o[C];
  for (int c = 0; c < C; ++c) o[c] = u.state + (vector + c) * lanes_state(u.kv->format.layout) + 32;
  for (; d < end; d += D) value_block<In, D, C>(w.panel + vector * attention_tile * 16, steps, values, d, w.shrink[vector], o);
}

// Calls f.template operator()<C>(first) for groups of four, two and one vectors.
template <class F>
inline void for_groups(int vectors, F f) {
  int v = 0;
  if constexpr (vector_registers >= 32) {
    for (; v + 4 <= vectors; v += 4) f.template operator()<4>(v);
    for (; v + 2 <= vectors; v += 2) f.template operator()<2>(v);
  }
  for (; v < vectors; ++v) f.template operator()<1>(v);
}

template <class In>
inline void load_tile(const AttentionUnit& u, int from, int n, int next, typename In::Element* key_room, LaneTile<In>& tile) {
  using T = typename In::Element;
  const KvFormat& f = u.kv->format;
  const KvLayout& l = f.layout;
  const int64_t key_step = round_up(l.d_k > l.d_v ? l.d_k : l.d_v, 32);
  const bool keys_lie = lies_as<T>(f) && l.d_k % In::depth == 0;
  const std::byte *row[attention_tile], *ahead[attention_tile];
  find_rows(*u.kv, *u.span, from, n, row);
  find_rows(*u.kv, *u.span, from + n, next, ahead);
  tile.n = n, tile.padded = int(round_up(n, 8)), tile.ahead = keys_lie && next > 0;
  for (int t = 0; t < n; ++t) {
    const std::byte* after = next > 0 ? ahead[t < next ? t : next - 1] : nullptr;
    if (keys_lie) {
      tile.key[t] = reinterpret_cast<const T*>(row[t]) + int64_t(u.head) * l.d_k;
      if (after) tile.next_key[t] = reinterpret_cast<const T*>(after) + int64_t(u.head) * l.d_k;
    } else {
      read_key<true>(f, row[t], u.head, key_room + t * key_step);
      tile.key[t] = key_room + t * key_step;
      if (after) prefetch_key(f, after, u.head);
    }
    if (after && !l.v_in_k) prefetch_value(f, after, u.head);
  }
  for (int t = n; t < tile.padded; ++t) {
    tile.key[t] = tile.key[n - 1];
    if (tile.ahead) tile.next_key[t] = tile.next_key[n - 1];
  }

  // Values: where they lie if nothing has to be converted or padded.
  const bool values_lie = lies_as<T>(f) && l.d_v % (In::depth == 1 ? 16 : 32) == 0;
  const int64_t first_value = l.v_in_k ? int64_t(u.head) * l.d_k : int64_t(l.heads) * l.d_k + int64_t(u.head) * l.d_v;
  T* copies = key_room + attention_tile * key_step;
  for (int t = 0; t < n; ++t) {
    if (values_lie) {
      tile.value[t] = reinterpret_cast<const T*>(row[t]) + first_value;
    } else if (l.v_in_k && !keys_lie) {
      tile.value[t] = tile.key[t];
    } else {
      if (l.v_in_k)
        read_key<true>(f, row[t], u.head, copies + t * key_step);
      else
        read_value<true>(f, row[t], u.head, copies + t * key_step);
      tile.value[t] = copies + t * key_step;
    }
  }
}

template <class In>
inline void attend_lanes_in(const AttentionUnit& u) {
  using T = typename In::Element;
  const KvLayout& l = u.kv->format.layout;
  const int vectors = (u.rows + 15) / 16;
  const int64_t q_vector = round_up(l.d_k, 32) * 16, width = round_up(l.d_v, 16);
  LaneTile<In> tile;
  ValueColumns<In> columns;
  Weights<T> weights;
  auto* scores = reinterpret_cast<float*>(u.scratch);
  weights.panel = reinterpret_cast<T*>(scores + attention_vectors * attention_tile * 16);
  auto* q = reinterpret_cast<T*>(scores + 2 * attention_vectors * attention_tile * 16);
  T* room = q + attention_vectors * q_vector;
  for (int v = 0; v < vectors; ++v) {
    start_lanes(u.state + v * lanes_state(l), l);
    pack_queries(u, u.first + 16 * v, q + v * q_vector);
  }
  const Range seen = visible_rows(u, u.first, u.first + u.rows - 1);
  for (int from = seen.from; from < seen.to; from += attention_tile) {
    const int n = seen.to - from < attention_tile ? seen.to - from : attention_tile;
    const int left = seen.to - from - n, next = left < attention_tile ? left : attention_tile;
    load_tile(u, from, n, next, room, tile);
    const int64_t start = int64_t(u.span->kv_position) + from;
    for_groups(vectors, [&]<int C>(int v) { weigh_group<In, C>(u, tile, start, v, q, scores, weights); });
    const int64_t steps = (n + In::depth - 1) / In::depth;
    for (int64_t d = 0; d < width; d += 32) {
      columns.take(tile, d);
      const int64_t end = d + 32 < width ? d + 32 : width;
      for_groups(vectors, [&]<int C>(int v) { sum_group<In, C>(u, columns, steps, d, end, v, weights); });
    }
  }
}

}  // namespace
}  // namespace mla
