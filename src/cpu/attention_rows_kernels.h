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

// Query row `row` for the cache head `head`. [d_k]
inline const float* query_row(const AttentionUnit& u, int head, int row) {
  return u.q + row / u.group * u.q_token + (int64_t(head) * u.group + row % u.group) * u.q_head;
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
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
}
[[gnu::always_inline]] inline void prefetch_key(const KvFormat& f, const std::byte* row, int head) {
  const KvLayout& l = f.layout;
  if (!f.coded()) return prefetch_bytes(row + row_bytes(f.type, int64_t(head) * l.d_k), row_bytes(f.type, l.d_k));
  if (l.v_in_k) return prefetch_bytes(row, f.row_bytes());
  prefetch_bytes(row + int64_t(head) * l.d_k, l.d_k);
}
[[gnu::always_inline]] inline void prefetch_value(const KvFormat& f, const std::byte* row, int head) {
  const KvLayout& l = f.layout;
  const int64_t first = int64_t(l.heads) * l.d_k + int64_t(head) * l.d_v;
  prefetch_bytes(row + row_bytes(f.type, first), row_bytes(f.type, l.d_v));
}

inline f32x16 load_some(const float* p) { return load(p); }
inline bf16x32 load_some(const uint16_t* p) { return load_bf16x32(p); }
template <class T>
constexpr int row_lanes = 64 / int(sizeof(T));

// Keys and query rows whose products are formed together, so that either serves the other while it is in a register.
constexpr int rows_keys = vector_registers < 32 ? 4 : 8, rows_queries = vector_registers < 32 ? 3 : 2;

// Calls f.template operator()<n>(first) for groups of at most `most` (2, 3 or 4) of the query rows.
template <int most, class F>
inline void for_query_rows(int rows, F f) {
  int r = 0;
  for (; r + most <= rows && !(most == 3 && rows - r == 4); r += most) f.template operator()<most>(r);
  if (most == 3 && rows - r == 4) f.template operator()<2>(r), r += 2;  // two and two rather than three and one
  if constexpr (most > 2) {
    if (rows - r == 3) return f.template operator()<3>(r);
  }
  if (rows - r == 2) f.template operator()<2>(r);
  if (rows - r == 1) f.template operator()<1>(r);
}

// quads[h][k / 4][0, 16): what sum_quarters makes the products of keys k … k + 3 with query h, over n elements.
template <int H, class T>
inline void dot_rows(const T* q, int64_t q_row, int64_t n, const T* const* keys, float* quads) {
  f32_dots acc[rows_keys][H];
  const T* key[rows_keys];
  for (int k = 0; k < rows_keys; ++k) {
    key[k] = keys[k];
    for (int h = 0; h < H; ++h) acc[k][h] = zero_dots();
  }
  for (int64_t d = 0; d < n; d += row_lanes<T>) {
    decltype(load_some(q)) x[rows_keys];
#pragma GCC unroll 8
    for (int k = 0; k < rows_keys; ++k) x[k] = load_some(key[k] + d);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const auto query = load_some(q + h * q_row + d);
#pragma GCC unroll 8
      for (int k = 0; k < rows_keys; ++k) acc[k][h] = add_dots(acc[k][h], query, x[k]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < rows_keys; k += 4) store(quads + h * 64 + k * 4, sum_quads(acc[k][h], acc[k + 1][h], acc[k + 2][h], acc[k + 3][h]));
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
  }
  bool keys_lie, values_lie;
  int64_t key, value;
};

// What a tile of one cache head works with: staged rows where they do not lie as the products read them, scores and weights.
template <class T>
struct RowsTile {
  T* room;  // [attention_tile][step]
  int64_t step;
  const T *key[attention_tile], *value[attention_tile];
  float scores[most_query_rows * attention_tile], shrink[most_query_rows];
  T weights[most_query_rows * attention_tile];
};

// The tile that follows, brought closer while this one is at work: a few lines beside each key, in the order in which they lie, since many
// at once would hold up the loads.
struct NextTile {
  const std::byte* const* row;  // null for none
  int head, heads;              // of the unit

  [[gnu::always_inline]] void fetch(const KvFormat& f, int step) const {
    if (!row) return;
    const std::byte* at = row[step / heads];
    prefetch_key(f, at, head + step % heads);
    if (!f.layout.v_in_k) prefetch_value(f, at, head + step % heads);
  }
};

// Scores of a tile of n rows for all query rows of the unit. The tables of rows reach to the end of the tile.
template <class T>
inline void score_rows(const AttentionUnit& u, int head, const RowParts<T>& parts, int n, const std::byte* const* row, const NextTile& next,
                       const T* q, int64_t q_row, RowsTile<T>& tile) {
  const KvFormat& f = u.kv->format;
  const int64_t d_k = f.layout.d_k;
  for (int t = 0; t < n; t += 16) {
    float quads[most_query_rows * 64];
    const int end = n - t < 16 ? n - t : 16;
    if (end < 16) std::memset(quads, 0, size_t(u.rows) * 64 * sizeof(float));  // what no key writes
    for (int k = 0; k < end; k += rows_keys) {
      for (int i = t + k; i < t + k + rows_keys; ++i) {
        if (parts.keys_lie) {
          tile.key[i] = reinterpret_cast<const T*>(row[i]) + parts.key;
        } else {
          T* to = tile.room + i * tile.step;
          if (d_k % 32 != 0) std::memset(to + d_k / 32 * 32, 0, 32 * sizeof(T));  // what the products read beyond the key
          read_key<true>(f, row[i], head, to);
          tile.key[i] = to;
        }
        next.fetch(f, (head - u.head) * attention_tile + i);
      }
      for_query_rows<rows_queries>(u.rows, [&]<int H>(int r) {
        dot_rows<H>(q + r * q_row, q_row, round_up(d_k, row_lanes<T>), tile.key + t + k, quads + r * 64 + k * 4);
      });
    }
    for (int r = 0; r < u.rows; ++r) {
      const float* s = quads + r * 64;
      store(tile.scores + r * attention_tile + t, sum_quarters(load(s), load(s + 16), load(s + 32), load(s + 48)));
    }
  }
}

template <class T>
inline void find_values(const AttentionUnit& u, int head, const RowParts<T>& parts, int n, const std::byte* const* row, RowsTile<T>& tile) {
  const KvFormat& f = u.kv->format;
  for (int t = 0; t < n; ++t) {
    T* room = tile.room + t * tile.step;
    if (parts.values_lie) {
      tile.value[t] = reinterpret_cast<const T*>(row[t]) + parts.value;
    } else if (f.layout.v_in_k) {
      tile.value[t] = tile.key[t];
      if (parts.keys_lie) read_key<true>(f, row[t], head, room), tile.value[t] = room;
    } else {
      read_value<true>(f, row[t], head, room);
      tile.value[t] = room;
    }
  }
}

// One cache head's tile of n rows, from row `from` of the span on.
template <class T>
inline void attend_rows_tile(const AttentionUnit& u, int head, int from, int n, const std::byte* const* row, const NextTile& next,
                             const T* q, int64_t q_row, RowsTile<T>& tile, float* state) {
  constexpr int lanes = row_lanes<T>;
  const KvLayout& l = u.kv->format.layout;
  const RowParts<T> parts(u.kv->format, head);
  const int64_t o_row = rows_state(l);
  score_rows(u, head, parts, n, row, next, q, q_row, tile);
  for (int r = 0; r < u.rows; ++r) {
    const int64_t at = query_position(u, u.first + r) - u.span->kv_position - from;
    const int64_t to = !u.mask.causal || at + 1 > n ? n : at < 0 ? 0 : at + 1;
    const int64_t edge = u.mask.window > 0 ? at - u.mask.window + 1 : 0;
    const int first = int(edge < 0 ? 0 : edge > n ? n : edge);
    tile.shrink[r] = softmax_row(tile.scores + r * attention_tile, first, int(to), state + r * o_row, tile.weights + r * attention_tile);
  }
  const int padded = int(round_up(n, 2));  // bf16 dots take rows in pairs
  find_values(u, head, parts, padded, row, tile);
  auto sum = [&]<int W>(int64_t d) {
    for_query_rows<4>(u.rows, [&]<int H>(int r) {
      sum_rows<H, W>(tile.weights + r * attention_tile, n, tile.value, d, tile.shrink + r, state + r * o_row + 16, o_row);
    });
  };
  int64_t d = 0;
  if constexpr (vector_registers >= 32)
    for (; d + 64 <= l.d_v; d += 64) sum.template operator()<4>(d);
  for (; d < l.d_v; d += lanes) sum.template operator()<lanes / 16>(d);
}

template <class T>
inline void attend_rows_in(const AttentionUnit& u) {
  const KvLayout& l = u.kv->format.layout;
  const int64_t q_row = round_up(l.d_k, 32);
  RowsTile<T> tile;
  tile.room = reinterpret_cast<T*>(u.scratch);
  tile.step = round_up(l.d_k > l.d_v ? l.d_k : l.d_v, 32);
  T* q = tile.room + attention_tile * tile.step;
  for (int g = 0; g < u.heads; ++g) {
    for (int r = 0; r < u.rows; ++r) {
      float* state = u.state + (g * u.rows + r) * rows_state(l);
      std::memset(state, 0, size_t(rows_state(l)) * sizeof(float));
      state[0] = -__builtin_inff();
      const float* from = query_row(u, u.head + g, u.first + r);
      T* to = q + (g * u.rows + r) * q_row;
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
    for (int step = 0; from == seen.from && step < n * u.heads; ++step) NextTile{row, u.head, u.heads}.fetch(u.kv->format, step);
    find_rows(*u.kv, *u.span, from + n, next, ahead);
    for (int t = n; t < attention_tile; ++t) row[t] = row[n - 1];
    for (int t = next; t < attention_tile && next > 0; ++t) ahead[t] = ahead[next - 1];
    for (int g = 0; g < u.heads; ++g)
      attend_rows_tile<T>(u, u.head + g, from, n, row, {next > 0 ? ahead : nullptr, u.head, u.heads}, q + g * u.rows * q_row, q_row, tile,
                          u.state + g * u.rows * rows_state(l));
  }
}

inline void attend_rows(const AttentionUnit& u) {
  if (isa_has_bf16 && u.kv->format.type != DType::f32)
    attend_rows_in<uint16_t>(u);
  else
    attend_rows_in<float>(u);
}

}  // namespace
}  // namespace mla
