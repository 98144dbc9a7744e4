// Attention, form "lanes", in whole numbers: where bf16 dots are missing or slow, a dot of 16-bit integers does twice the products of an
// f32 step. Queries and rows become codes of 12 bits and a sign, relative to the largest of each chunk of a row; the sums of codes are
// exact.
#pragma once

#include "cpu/attention_lanes_kernels.h"

namespace mla {
namespace {

constexpr int code_chunk = 128;     // elements of one scale, whose products one 32-bit sum takes
constexpr int code_limit = 4095;    // of queries, keys and values
constexpr int weight_limit = 8191;  // of the softmax's weights
static_assert(int64_t(code_chunk) * code_limit * code_limit <= INT32_MAX);
static_assert(int64_t(attention_tile) * code_limit * weight_limit <= INT32_MAX);
constexpr float least_scaled = 1e-30f;  // what is smaller throughout a chunk becomes zeros

constexpr int chunks_of(int64_t n) { return int((n + code_chunk - 1) / code_chunk); }
constexpr int most_chunks = 16;  // of a key or value

// The scale of a chunk whose largest magnitude is `peak`, and its inverse. A peak that is no number leaves a scale that is none.
struct CodeScale {
  float scale, inverse;
  explicit CodeScale(float peak)
      : scale(peak <= least_scaled ? 0 : peak / code_limit), inverse(peak <= least_scaled ? 0 : code_limit / peak) {}
};

// Codes of n elements, load_at(i, m) giving m of them from i on, with zeros up to a multiple of 32, and a scale for each chunk.
template <class Load>
inline void write_i16(int64_t n, Load load_at, int16_t* code, float* scale) {
  for (int64_t from = 0; from < n; from += code_chunk, ++scale) {
    const int64_t end = n - from < code_chunk ? n : from + code_chunk;
    f32x16 most = zero_f32(), total = zero_f32();
    for (int64_t i = from; i < end; i += 16) {
      const f32x16 x = abs(load_at(i, end - i < 16 ? int(end - i) : 16));
      most = max(most, x), total = total + x;
    }
    const CodeScale by(top(most) + 0 * sum(total));  // maxima lose what is no number, sums keep it
    *scale = by.scale;
    for (int64_t i = from; i < end; i += 16) store_i16(code + i, to_i32(load_at(i, end - i < 16 ? int(end - i) : 16) * splat(by.inverse)));
  }
  const int64_t written = round_up(n, 16);
  std::memset(code + written, 0, size_t(round_up(n, 32) - written) * sizeof(int16_t));
}

// Magnitudes of bf16 compare as whole numbers. n is a multiple of 32.
inline void write_i16_of_bf16(const uint16_t* p, int64_t n, int16_t* code, float* scale) {
  for (int64_t from = 0; from < n; from += code_chunk, ++scale) {
    const int64_t end = n - from < code_chunk ? n : from + code_chunk;
    bf16x32 most = to_bf16x32(zero_f32(), zero_f32());
    for (int64_t i = from; i < end; i += 32) most = max_magnitude(most, load_bf16x32(p + i));
    const f32x16 even = widen_even(most), odd = widen_odd(most);
    const CodeScale by(top(max(even, odd)) + 0 * sum(even + odd));
    *scale = by.scale;
    const f32x16 inverse = splat(by.inverse);
    for (int64_t i = from; i < end; i += 32) {
      const bf16x32 x = load_bf16x32(p + i);
      store_i16x32(code + i, pair_i16(to_i32(widen_even(x) * inverse), to_i32(widen_odd(x) * inverse)));
    }
  }
}

// Of the codes of an i8 cache, whose groups have their largest magnitude at 127. n is a multiple of code_chunk.
inline void write_i16_of_i8(const int8_t* p, const float* group, int64_t n, int16_t* code, float* scale) {
  constexpr int groups = code_chunk / KvFormat::i8_group;
  for (int64_t from = 0; from < n; from += code_chunk, ++scale, group += groups) {
    float most = 0, total = 0;
    for (int g = 0; g < groups; ++g) most = group[g] > most ? group[g] : most, total += group[g];
    const CodeScale by(127 * most + 0 * total);
    *scale = by.scale;
    for (int i = 0; i < code_chunk; i += 16)
      store_i16(code + from + i, to_i32(load_i8(p + from + i) * splat(group[i / KvFormat::i8_group] * by.inverse)));
  }
}

inline void write_i16(DType type, const std::byte* from, int64_t n, int16_t* code, float* scale) {
  const auto* p = reinterpret_cast<const uint16_t*>(from);
  if (type == DType::f16)
    return write_i16(
        n, [p](int64_t i, int m) { return m == 16 ? load_f16(p + i) : load_f16(p + i, m); }, code, scale);
  if (n % 32 == 0) return write_i16_of_bf16(p, n, code, scale);
  write_i16(
      n, [p](int64_t i, int m) { return m == 16 ? load_bf16(p + i) : load_bf16(p + i, m); }, code, scale);
}
inline void write_i16(const float* p, int64_t n, int16_t* code, float* scale) {
  write_i16(
      n, [p](int64_t i, int m) { return m == 16 ? load(p + i) : load(p + i, m); }, code, scale);
}

// A head's key; room: for one in f32.
inline void write_key(const KvFormat& f, const std::byte* row, int head, float* room, int16_t* code, float* scale) {
  const KvLayout& l = f.layout;
  if (!f.coded()) return write_i16(f.type, row + row_bytes(f.type, int64_t(head) * l.d_k), l.d_k, code, scale);
  if (f.type != DType::i8 || !l.v_in_k || l.d_v % code_chunk != 0)
    return read_key<true>(f, row, head, room), write_i16(room, l.d_k, code, scale);
  const auto* group = reinterpret_cast<const float*>(row + f.scale_offset()) + head * f.groups(l.d_v);
  const int rotary = l.d_k - l.d_v;
  write_i16_of_i8(reinterpret_cast<const int8_t*>(row) + int64_t(head) * l.d_v, group, l.d_v, code, scale);
  write_i16(DType::bf16, row + f.kept_offset() + 2 * int64_t(head) * rotary, rotary, code + l.d_v, scale + chunks_of(l.d_v));
}

// A head's value where it is not part of the key.
inline void write_value(const KvFormat& f, const std::byte* row, int head, float* room, int16_t* code, float* scale) {
  const KvLayout& l = f.layout;
  const int64_t first = int64_t(l.heads) * l.d_k + int64_t(head) * l.d_v;
  if (!f.coded()) return write_i16(f.type, row + row_bytes(f.type, first), l.d_v, code, scale);
  read_value<true>(f, row, head, room);
  write_i16(room, l.d_v, code, scale);
}

// A tile of the context in codes, and where its parts lie in a unit's scratch.
struct CodeTile {
  explicit CodeTile(const KvLayout& l) : key_step(round_up(l.d_k, 32)), value_step(round_up(l.d_v, 32)), pair_step(2 * value_step + 32) {}
  int64_t key_step, value_step;
  int64_t pair_step;  // a line more than its content: steps of a power of two would share few places of the first-level cache
  int16_t* key;       // [attention_tile][key_step]
  int16_t* pairs;     // [attention_tile / 2][pair_step]: [value_step][2], the values of two rows side by side
  float key_scale[attention_tile][most_chunks], value_scale[most_chunks][attention_tile];
  const std::byte* next[attention_tile];  // the key in the tile that follows; valid if `ahead`
  float poison;                           // NaN if a row holds what is no number, else 0
  bool ahead;
  int n, padded;
};

inline void load_codes(const AttentionUnit& u, int from, int n, int next, float* room, int16_t* values, CodeTile& tile) {
  const KvFormat& f = u.kv->format;
  const KvLayout& l = f.layout;
  const bool plain = !f.coded();
  const std::byte *row[attention_tile], *ahead[attention_tile];
  find_rows(*u.kv, *u.span, from, n, row);
  find_rows(*u.kv, *u.span, from + n, next, ahead);
  tile.n = n, tile.padded = int(round_up(n, 8)), tile.ahead = plain && next > 0, tile.poison = 0;
  const int64_t key_at = row_bytes(f.type, int64_t(u.head) * l.d_k);
  for (int t = 0; t < n; ++t) {
    int16_t* key = tile.key + t * tile.key_step;
    int16_t* value = l.v_in_k ? key : values + t % 2 * tile.value_step;
    float scale[most_chunks];
    write_key(f, row[t], u.head, room, key, tile.key_scale[t]);
    if (!l.v_in_k) write_value(f, row[t], u.head, room, value, scale);
    for (int c = 0; c < chunks_of(l.d_k); ++c) tile.poison += 0 * tile.key_scale[t][c];
    for (int c = 0; c < chunks_of(l.d_v); ++c) {
      tile.value_scale[c][t] = l.v_in_k ? tile.key_scale[t][c] : scale[c];
      tile.poison += 0 * tile.value_scale[c][t];
    }
    if (next > 0) {
      const std::byte* after = ahead[t < next ? t : next - 1];
      tile.next[t] = after + key_at;
      if (!plain) prefetch_key(f, after, u.head);
      if (!l.v_in_k) prefetch_value(f, after, u.head);
    }
    if (t % 2 == 0 && t + 1 < n) continue;
    const int16_t* even = t % 2 == 0 ? value
                          : l.v_in_k ? key - tile.key_step
                                     : values;  // a last row alone is its own partner, which weighs nothing
    for (int64_t d = 0; d < tile.value_step; d += 32) {
      const i16x32 x = load_i16x32(even + d), y = load_i16x32(value + d);
      int16_t* to = tile.pairs + t / 2 * tile.pair_step + 2 * d;
      store_i16x32(to, interleave_low(x, y));
      store_i16x32(to + 32, interleave_high(x, y));
    }
  }
  for (int t = n; t < tile.padded; ++t) {
    std::memset(tile.key + t * tile.key_step, 0, size_t(tile.key_step) * sizeof(int16_t));
    for (float& s : tile.key_scale[t]) s = 0;
    for (auto& s : tile.value_scale) s[t] = 0;
  }
}

// Queries of a unit: panels [vector][d_k padded / 2][16][2], a scale for each chunk and lane.
struct CodeQueries {
  int16_t* panel;
  int64_t vector;  // codes of one vector
  float scale[attention_vectors][most_chunks][16];
};

inline void pack_codes(const AttentionUnit& u, int v, CodeQueries& q) {
  const int d_k = u.kv->format.layout.d_k, first = u.first + 16 * v;
  const int rows = u.first + u.rows - first < 16 ? u.first + u.rows - first : 16;
  int16_t* panel = q.panel + v * q.vector;
  const float* row[16];
  for (int i = 0; i < rows; ++i) row[i] = query_row(u, u.head, first + i);
  for (int c = 0; c < chunks_of(d_k); ++c) {
    const int from = c * code_chunk, end = d_k - from < code_chunk ? d_k : from + code_chunk;
    auto part = [&](int i, int d) { return end - d < 16 ? load(row[i] + d, end - d) : load(row[i] + d); };
    float inverse[16] = {};
    for (int i = 0; i < 16; ++i) {
      f32x16 most = zero_f32();
      for (int d = from; d < end && i < rows; d += 16) most = max(most, abs(part(i, d)));
      const CodeScale by(top(most));
      inverse[i] = by.inverse, q.scale[v][c][i] = u.scale * by.scale;
    }
    for (int d = from; d < end; d += 16) {
      f32x16 block[16];
      for (int i = 0; i < 16; ++i) block[i] = i < rows ? splat(inverse[i]) * part(i, d) : zero_f32();
      transpose(block);
      for (int i = 0; i < 16; i += 2) store_i16x32(panel + (d + i) * 16, pair_i16(to_i32(block[i]), to_i32(block[i + 1])));
    }
  }
}

// scores[c][r] += scale[c] · key_scale[r] · Σ_step q[c][step] · keys[r][step] over one chunk, for R rows and C vectors.
template <int R, int C>
inline void score_codes(const CodeQueries& q, int vector, int chunk, int64_t steps, const CodeTile& tile, int row, bool fetch,
                        float* scores) {
  i32x16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = splat_i32(0);
  const int16_t* panel = q.panel + vector * q.vector + chunk * code_chunk * 16;
  const int16_t* key = tile.key + row * tile.key_step + chunk * code_chunk;
  for (int64_t line = 0; line < steps; line += 16) {
    if (fetch)
      for (int r = 0; r < R; ++r) __builtin_prefetch(tile.next[row + r] + (chunk * code_chunk + 2 * line) * 2, 0, 2);
    const int64_t end = line + 16 < steps ? line + 16 : steps;
    for (int64_t s = line; s < end; ++s) {
      i16x32 lanes[C];
      for (int c = 0; c < C; ++c) lanes[c] = load_i16x32(panel + c * q.vector + s * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const i16x32 element = splat_i16_pair(key + r * tile.key_step + s * 2);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = dot_i16(acc[r][c], lanes[c], element);
      }
    }
  }
  for (int c = 0; c < C; ++c) {
    const f32x16 scale = load(q.scale[vector + c][chunk]);
    for (int r = 0; r < R; ++r) {
      float* s = scores + (c * attention_tile + row + r) * 16;
      const f32x16 product = to_f32(acc[r][c]) * (scale * splat(tile.key_scale[row + r][chunk]));
      store(s, chunk == 0 ? product : load(s) + product);
    }
  }
}

// What the vectors of a unit bring to a tile's values. The softmax leaves f32 weights where the scores were.
struct CodeWeights {
  float* weight;   // [attention_vectors][attention_tile][16]
  int16_t* panel;  // [attention_vectors][attention_tile / 2][16][2]: times the rows' scales of a chunk, in codes
  float shrink[attention_vectors][16], scale[attention_vectors][16];
  bool seen[attention_vectors];  // false: no lane sees any of the tile
};

template <int C>
inline void weigh_codes(const AttentionUnit& u, const CodeTile& tile, int64_t start, int vector, const CodeQueries& q, CodeWeights& w) {
  constexpr int R = vector_registers < 32 ? 4 : C < 4 ? 8 : 4;
  const KvLayout& l = u.kv->format.layout;
  const Sight sight = sight_of(u, start, tile.n, vector, C);
  for (int c = 0; c < C; ++c) w.seen[vector + c] = sight.any;
  if (!sight.any) return;
  float* scores = w.weight + vector * attention_tile * 16;
  for (int c = 0; c < chunks_of(l.d_k); ++c) {
    const int64_t elements = l.d_k - c * code_chunk < code_chunk ? l.d_k - c * code_chunk : code_chunk;
    for (int r = 0; r < tile.padded; r += R)
      score_codes<R, C>(q, vector, c, (elements + 1) / 2, tile, r, vector == 0 && tile.ahead, scores);
  }
  for (int c = 0; c < C; ++c, scores += attention_tile * 16) {
    if (sight.partial) mask_tile(u, u.first + (vector + c) * 16, start, tile.n, scores);
    store(w.shrink[vector + c], softmax_tile(scores, tile.n, tile.padded, u.state + (vector + c) * lanes_state(l), scores));
  }
}

// The weights of one vector times the scales of a chunk of the values, as codes.
inline void write_weights(const CodeTile& tile, int chunk, int vector, CodeWeights& w) {
  const float* weight = w.weight + vector * attention_tile * 16;
  const float* scale = tile.value_scale[chunk];
  f32x16 even = zero_f32(), odd = zero_f32();
  for (int t = 0; t < tile.padded; t += 2) {
    even = max(even, load(weight + t * 16) * splat(scale[t]));
    odd = max(odd, load(weight + t * 16 + 16) * splat(scale[t + 1]));
  }
  const f32x16 peak = max(even, odd), least = splat(least_scaled);
  const f32x16 inverse = where_less(least, peak, splat(weight_limit) / peak, zero_f32());
  store(w.scale[vector], splat(tile.poison) + where_less(least, peak, peak * splat(1.0f / weight_limit), zero_f32()));
  int16_t* panel = w.panel + vector * attention_tile * 16;
  for (int t = 0; t < tile.padded; t += 2) {
    const f32x16 p = load(weight + t * 16) * splat(scale[t]), q = load(weight + t * 16 + 16) * splat(scale[t + 1]);
    store_i16x32(panel + t * 16, pair_i16(to_i32(p * inverse), to_i32(q * inverse)));
  }
}

// o[c][d + i] = o[c][d + i] · shrink[c] + scale[c] · Σ_step weights[c][step] · values[step][d + i] for D elements and C vectors.
template <int D, int C>
inline void sum_codes(const AttentionUnit& u, const CodeTile& tile, int64_t d, int vector, const CodeWeights& w) {
  i32x16 acc[D][C];
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < C; ++c) acc[i][c] = splat_i32(0);
  const int16_t *panel = w.panel + vector * attention_tile * 16, *value = tile.pairs + d * 2;
  const int steps = (tile.n + 1) / 2;
  for (int s = 0; s < steps; ++s, value += tile.pair_step) {
    i16x32 lanes[C];
    for (int c = 0; c < C; ++c) lanes[c] = load_i16x32(panel + c * attention_tile * 16 + s * 32);
#pragma GCC unroll 16
    for (int i = 0; i < D; ++i) {
      const i16x32 element = splat_i16_pair(value + i * 2);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[i][c] = dot_i16(acc[i][c], lanes[c], element);
    }
  }
  for (int c = 0; c < C; ++c) {
    const f32x16 shrink = load(w.shrink[vector + c]), scale = load(w.scale[vector + c]);
    float* o = u.state + (vector + c) * lanes_state(u.kv->format.layout) + 32 + d * 16;
    for (int i = 0; i < D; ++i) store(o + i * 16, fma(to_f32(acc[i][c]), scale, load(o + i * 16) * shrink));
  }
}

inline void attend_lanes_i16(const AttentionUnit& u) {
  const KvLayout& l = u.kv->format.layout;
  const int vectors = (u.rows + 15) / 16;
  const int64_t width = round_up(l.d_v, 16);
  CodeTile tile(l);
  CodeQueries q;
  CodeWeights weights;
  auto* p = reinterpret_cast<int16_t*>(u.scratch);
  auto take = [&p](int64_t n) { return p += n, p - n; };
  weights.weight = reinterpret_cast<float*>(take(2 * attention_vectors * attention_tile * 16));
  weights.panel = take(attention_vectors * attention_tile * 16);
  q.vector = tile.key_step * 16;
  q.panel = take(attention_vectors * q.vector);
  tile.key = take(attention_tile * tile.key_step);
  tile.pairs = take(attention_tile / 2 * tile.pair_step);
  int16_t* values = take(2 * tile.value_step);
  auto* room = reinterpret_cast<float*>(take(2 * std::max(tile.key_step, tile.value_step)));
  for (int v = 0; v < vectors; ++v) {
    start_lanes(u.state + v * lanes_state(l), l);
    pack_codes(u, v, q);
  }
  const Range seen = visible_rows(u, u.first, u.first + u.rows - 1);
  for (int from = seen.from; from < seen.to; from += attention_tile) {
    const int n = seen.to - from < attention_tile ? seen.to - from : attention_tile;
    const int left = seen.to - from - n, next = left < attention_tile ? left : attention_tile;
    load_codes(u, from, n, next, room, values, tile);
    const int64_t start = int64_t(u.span->kv_position) + from;
    for_groups(vectors, [&]<int C>(int v) { weigh_codes<C>(u, tile, start, v, q, weights); });
    for (int c = 0; c < chunks_of(l.d_v); ++c) {
      for (int v = 0; v < vectors; ++v)
        if (weights.seen[v]) write_weights(tile, c, v, weights);
      const int64_t end = c * code_chunk + code_chunk < width ? c * code_chunk + code_chunk : width;
      for (int64_t d = c * code_chunk; d < end; d += 16)
        for_groups(vectors, [&]<int C>(int v) {
          constexpr int D = (vector_registers < 32 ? 4 : 16) / C;
          if (!weights.seen[v]) return;
          for (int64_t i = d; i < d + 16; i += D) sum_codes<D, C>(u, tile, i, v, weights);
        });
    }
  }
}

}  // namespace
}  // namespace mla
