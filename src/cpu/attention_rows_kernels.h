// Attention, form "rows": for the few query rows of a decode with few heads per cache head, dot products along the rows of the cache,
// which run at the speed of memory. Also what both forms need to find rows and to know which a query sees.
#pragma once

#include "cpu/cache_rows_kernels.h"

#include <cmath>

namespace mla {
namespace {

struct Range {
  int from, to;
};

inline int64_t query_position(const AttentionUnit& u, int row) {
  const int last = u.first + u.rows - 1;  // lanes beyond the last row are like it
  return int64_t(u.span->position) + (row < last ? row : last) / u.group;
}

// Rows of the unit's stretch that some query row of [first, last] sees; the start stays at a tile.
inline Range visible_rows(const AttentionUnit& u, int first, int last) {
  int64_t from = u.from, to = u.to;
  const int64_t start = u.span->kv_position;
  if (u.mask.causal && query_position(u, last) + 1 - start < to) to = query_position(u, last) + 1 - start;
  if (u.mask.window > 0) {
    const int64_t edge = (query_position(u, first) - u.mask.window + 1 - start) / attention_tile * attention_tile;
    if (edge > from) from = edge;
  }
  return {int(from), int(to > from ? to : from)};
}

inline void find_rows(const Kv& kv, const Span& span, int from, int n, const std::byte** row) {
  if (n <= 0) return;
  int page = from / kv.page_tokens, slot = from % kv.page_tokens;
  const int64_t step = kv.format.row_bytes();
  const std::byte* p = kv.row(span.pages[page], slot);
  for (int t = 0; t < n; ++t) {
    row[t] = p;
    if (++slot < kv.page_tokens)
      p += step;
    else if (t + 1 < n)
      slot = 0, p = kv.row(span.pages[++page], 0);
  }
}

template <class T>
inline bool lies_as(const KvFormat& f) {
  return f.type == (sizeof(T) == 4 ? DType::f32 : DType::bf16);
}

// Inlined by force: GCC takes functions that only prefetch for ones without effect, and drops the calls.
[[gnu::always_inline]] inline void prefetch_bytes(const std::byte* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) prefetch(p + i);
}
[[gnu::always_inline]] inline void prefetch_key(const KvFormat& f, const std::byte* row, int head) {
  const KvLayout& l = f.layout;
  if (f.type != DType::i8) return prefetch_bytes(row + row_bytes(f.type, int64_t(head) * l.d_k), row_bytes(f.type, l.d_k));
  if (l.v_in_k) return prefetch_bytes(row, f.row_bytes());
  prefetch_bytes(row + int64_t(head) * l.d_k, l.d_k);
}
[[gnu::always_inline]] inline void prefetch_value(const KvFormat& f, const std::byte* row, int head) {
  const KvLayout& l = f.layout;
  const int64_t first = int64_t(l.heads) * l.d_k + int64_t(head) * l.d_v;
  prefetch_bytes(row + (f.type == DType::i8 ? first : row_bytes(f.type, first)),
                 row_bytes(f.type == DType::i8 ? DType::i8 : f.type, l.d_v));
}

// How dot products along a row run: whole f32, or pairs of bf16 summed in f32.
inline f32x16 dot_step(f32x16 acc, const float* q, f32x16 key) { return fma(load(q), key, acc); }
inline f32x16 dot_step(f32x16 acc, const uint16_t* q, bf16x32 key) { return dot_bf16(acc, load_bf16x32(q), key); }
inline f32x16 load_some(const float* p) { return load(p); }
inline bf16x32 load_some(const uint16_t* p) { return load_bf16x32(p); }
template <class T>
constexpr int row_lanes = 64 / int(sizeof(T));

// quads[h][0, 16): what sum_quarters makes the products of four keys with query h, over n elements.
template <int H, class T>
inline void dot_rows(const T* q, int64_t q_row, int64_t n, const T* const* keys, float* quads) {
  f32x16 acc[4][H];
  for (int r = 0; r < 4; ++r)
    for (int h = 0; h < H; ++h) acc[r][h] = zero_f32();
  const T *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
  for (int64_t d = 0; d < n; d += row_lanes<T>) {
    const auto x0 = load_some(k0 + d), x1 = load_some(k1 + d), x2 = load_some(k2 + d), x3 = load_some(k3 + d);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const T* query = q + h * q_row + d;
      acc[0][h] = dot_step(acc[0][h], query, x0), acc[1][h] = dot_step(acc[1][h], query, x1);
      acc[2][h] = dot_step(acc[2][h], query, x2), acc[3][h] = dot_step(acc[3][h], query, x3);
    }
  }
  for (int h = 0; h < H; ++h) store(quads + h * attention_tile * 4, sum_quads(acc[0][h], acc[1][h], acc[2][h], acc[3][h]));
}

// o[h] = o[h] · shrink[h] + Σ_t weights[h][t] · values[t], over elements [d, d + 16 W).
template <int H, int W>
inline void sum_rows(const float* weights, int n, const float* const* values, int64_t d, const float* shrink, float* o, int64_t o_row) {
  f32x16 acc[H][W];
  for (int h = 0; h < H; ++h)
    for (int w = 0; w < W; ++w) acc[h][w] = load(o + h * o_row + d + 16 * w) * splat(shrink[h]);
  for (int t = 0; t < n; ++t) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const f32x16 v = load(values[t] + d + 16 * w);
      for (int h = 0; h < H; ++h) acc[h][w] = fma(splat(weights[h * attention_tile + t]), v, acc[h][w]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int w = 0; w < W; ++w) store(o + h * o_row + d + 16 * w, acc[h][w]);
}
template <int H, int W>
inline void sum_rows(const uint16_t* weights, int n, const uint16_t* const* values, int64_t d, const float* shrink, float* o,
                     int64_t o_row) {
  f32x16 acc[H][W];
  for (int h = 0; h < H; ++h)
    for (int w = 0; w < W; ++w) acc[h][w] = load(o + h * o_row + d + 16 * w) * splat(shrink[h]);
  for (int t = 0; t < n; t += 2) {
    const uint16_t *a = values[t] + d, *b = values[t + 1] + d;
    bf16x32 weight[H];
    for (int h = 0; h < H; ++h) weight[h] = splat_bf16_pair(weights + h * attention_tile + t);
#pragma GCC unroll 4
    for (int w = 0; w < W; w += 2) {
      const bf16x32 x = load_bf16x32(a + 16 * w), y = load_bf16x32(b + 16 * w);
      const bf16x32 low = interleave_low(x, y), high = interleave_high(x, y);
      for (int h = 0; h < H; ++h) acc[h][w] = dot_bf16(acc[h][w], weight[h], low), acc[h][w + 1] = dot_bf16(acc[h][w + 1], weight[h], high);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int w = 0; w < W; ++w) store(o + h * o_row + d + 16 * w, acc[h][w]);
}

// The softmax of one query row over a tile whose scores outside [from, to) do not count. Returns by how much the sums so far shrink.
template <class T>
inline float softmax_row(float* scores, int from, int to, float* top_total, T* weights) {
  for (int t = 0; t < from; ++t) scores[t] = -__builtin_inff();
  for (int t = to; t < attention_tile; ++t) scores[t] = -__builtin_inff();
  f32x16 most = load(scores);
  for (int t = 16; t < attention_tile; t += 16) most = max(most, load(scores + t));
  const float before = top_total[0], best = top(most) > before ? top(most) : before;
  const f32x16 base = splat(best == -__builtin_inff() ? 0 : best);
  f32x16 total = zero_f32();
  for (int t = 0; t < attention_tile; t += 16) {
    const f32x16 p = exp(load(scores + t) - base);
    total = total + p;
    put(weights + t, p);
  }
  const float shrink = before == -__builtin_inff() ? 0 : std::exp(before - best);
  top_total[0] = best;
  top_total[1] = top_total[1] * shrink + sum(total);
  return shrink;
}

// Where a head's parts of a row begin, in elements, and whether the products can read them there.
template <class T>
struct RowParts {
  RowParts(const KvFormat& f, int head) {
    const KvLayout& l = f.layout;
    const bool same = lies_as<T>(f);
    keys_lie = same && l.d_k % row_lanes<T> == 0, values_lie = same && l.d_v % row_lanes<T> == 0;
    key = int64_t(head) * l.d_k;
    value = l.v_in_k ? key : int64_t(l.heads) * l.d_k + int64_t(head) * l.d_v;
    key_bytes = row_bytes(f.type, l.d_k), value_bytes = row_bytes(f.type, l.d_v);
    key_at = row_bytes(f.type, key), value_at = row_bytes(f.type, value);
  }
  bool keys_lie, values_lie;
  int64_t key, value, key_bytes, value_bytes, key_at, value_at;
};

// One cache head's tile of n rows for H query rows. The tables of rows reach to the end of the tile.
template <class T, int H>
inline void attend_rows_tile(const AttentionUnit& u, int head, int from, int n, const std::byte* const* row, const std::byte* const* ahead,
                             const T* q, int64_t q_row, T* room, float* state) {
  constexpr int lanes = row_lanes<T>;
  const KvFormat& f = u.kv->format;
  const KvLayout& l = f.layout;
  const RowParts<T> parts(f, head);
  const int64_t step = round_up(l.d_k > l.d_v ? l.d_k : l.d_v, 32), o_row = rows_state(l);
  float quads[H * attention_tile * 4], scores[H * attention_tile], shrink[H];
  T weights[H * attention_tile];
  const T *key[attention_tile], *value[attention_tile];
  const int padded = int(round_up(n, 4));
  for (int t = 0; t < padded; t += 4) {
    for (int i = t; i < t + 4; ++i) {
      if (parts.keys_lie) {
        key[i] = reinterpret_cast<const T*>(row[i]) + parts.key;
      } else {
        T* to = room + i * step;
        std::memset(to + round_up(l.d_k, 32) - 32, 0, 32 * sizeof(T));  // what the products read beyond the key
        read_key<true>(f, row[i], head, to);
        key[i] = to;
      }
      if (ahead) prefetch_bytes(ahead[i] + parts.key_at, parts.key_bytes);
    }
    dot_rows<H>(q, q_row, round_up(l.d_k, lanes), key + t, quads + t * 4);
  }
  for (int h = 0; h < H; ++h) {
    for (int t = 0; t < padded; t += 16) {
      const float* s = quads + (h * attention_tile + t) * 4;
      store(scores + h * attention_tile + t, sum_quarters(load(s), load(s + 16), load(s + 32), load(s + 48)));
    }
    const int64_t at = query_position(u, u.first + h) - u.span->kv_position - from;
    const int64_t to = !u.mask.causal || at + 1 > n ? n : at < 0 ? 0 : at + 1;
    const int64_t edge = u.mask.window > 0 ? at - u.mask.window + 1 : 0;
    shrink[h] = softmax_row(scores + h * attention_tile,
                            int(edge < 0   ? 0
                                : edge > n ? n
                                           : edge),
                            int(to), state + h * o_row, weights + h * attention_tile);
  }
  for (int t = 0; t < padded; ++t) {
    if (parts.values_lie) {
      value[t] = reinterpret_cast<const T*>(row[t]) + parts.value;
    } else if (l.v_in_k) {
      value[t] = key[t];
      if (parts.keys_lie) read_key<true>(f, row[t], head, room + t * step), value[t] = room + t * step;
    } else {
      read_value<true>(f, row[t], head, room + t * step);
      value[t] = room + t * step;
    }
    if (ahead && !l.v_in_k) prefetch_bytes(ahead[t] + parts.value_at, parts.value_bytes);
  }
  int64_t d = 0;
  for (; d + 64 <= l.d_v; d += 64) sum_rows<H, 4>(weights, n, value, d, shrink, state + 16, o_row);
  for (; d < l.d_v; d += lanes) sum_rows<H, lanes / 16>(weights, n, value, d, shrink, state + 16, o_row);
}

template <class T, int H>
inline void attend_rows_in(const AttentionUnit& u) {
  const KvLayout& l = u.kv->format.layout;
  const int64_t q_row = round_up(l.d_k, 32), step = round_up(l.d_k > l.d_v ? l.d_k : l.d_v, 32);
  auto* room = reinterpret_cast<T*>(u.scratch);
  T* q = room + attention_tile * step;
  for (int g = 0; g < u.heads; ++g) {
    for (int h = 0; h < H; ++h) {
      float* state = u.state + (g * H + h) * rows_state(l);
      std::memset(state, 0, size_t(rows_state(l)) * sizeof(float));
      state[0] = -__builtin_inff();
      const int row = u.first + h;
      const float* from = u.q + row / u.group * u.q_token + (int64_t(u.head + g) * u.group + row % u.group) * u.q_head;
      T* to = q + (g * H + h) * q_row;
      std::memset(to, 0, size_t(q_row) * sizeof(T));
      const f32x16 scale = splat(u.scale);
      convert<false>(l.d_k, to, [=](int64_t i, int m) { return scale * (m == 16 ? load(from + i) : load(from + i, m)); });
    }
  }
  const Range seen = visible_rows(u, u.first, u.first + u.rows - 1);
  const std::byte *row[attention_tile], *ahead[attention_tile];
  for (int from = seen.from; from < seen.to; from += attention_tile) {
    const int n = seen.to - from < attention_tile ? seen.to - from : attention_tile;
    const int left = seen.to - from - n, next = left < attention_tile ? left : attention_tile;
    find_rows(*u.kv, *u.span, from, n, row);
    find_rows(*u.kv, *u.span, from + n, next, ahead);
    for (int t = n; t < attention_tile; ++t) row[t] = row[n - 1];
    for (int t = next; t < attention_tile && next > 0; ++t) ahead[t] = ahead[next - 1];
    for (int g = 0; g < u.heads; ++g)
      attend_rows_tile<T, H>(u, u.head + g, from, n, row, next > 0 ? ahead : nullptr, q + g * H * q_row, q_row, room,
                             u.state + g * H * rows_state(l));
  }
}

template <class T>
inline void attend_rows_of(const AttentionUnit& u) {
  static_assert(attention_few_rows == 4);
  switch (u.rows) {
    case 1: return attend_rows_in<T, 1>(u);
    case 2: return attend_rows_in<T, 2>(u);
    case 3: return attend_rows_in<T, 3>(u);
    default: return attend_rows_in<T, 4>(u);
  }
}

inline void attend_rows(const AttentionUnit& u) {
  if (isa_has_bf16 && u.kv->format.type != DType::f32)
    attend_rows_of<uint16_t>(u);
  else
    attend_rows_of<float>(u);
}

}  // namespace
}  // namespace mla
