// Products of packed weights with activations. Every output element is summed over blocks of 32 columns in one order, whatever the
// number of tokens beside it, so that results do not depend on the batch, the tiling or the threads.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/simd.h"

#include <utility>

namespace mla {
namespace {

inline const uint16_t* halves_at(const std::byte* p) { return reinterpret_cast<const uint16_t*>(p); }
inline const float* floats_at(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline const I8Block& i8_at(const std::byte* p) { return *reinterpret_cast<const I8Block*>(p); }

// Neighbouring groups of sixteen rows that meet the same activations together.
template <int G>
struct Groups {
  const std::byte* at;
  int64_t bytes;
  const std::byte* operator[](int g) const { return at + g * bytes; }
};

// The sums of T tokens over G groups of rows. Those of a large tile stay in memory, in the first-level cache: the registers are for the
// chains of dots under way.
template <int T, int G>
struct Sums {
  static constexpr bool in_memory = T * G > vector_registers / 8;
  float* at;
  int64_t stride;
  f32x16 own[T][G];  // unused where they are in memory

  Sums(float* out, int64_t out_stride) : at(out), stride(out_stride) {
    each([&](int t, int g) { set(t, g, zero_f32()); });
  }
  f32x16 get(int t, int g) const {
    if constexpr (in_memory) return load(at + t * stride + 16 * g);
    return own[t][g];
  }
  void set(int t, int g, f32x16 x) {
    if constexpr (in_memory)
      store(at + t * stride + 16 * g, x);
    else
      own[t][g] = x;
  }
  void finish() {
    if constexpr (!in_memory) each([&](int t, int g) { store(at + t * stride + 16 * g, own[t][g]); });
  }
  template <class F>
  static void each(F f) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) f(t, g);
  }
};

inline const I8Block& block_of(const std::byte* acts, int t) { return i8_at(acts + t * int(sizeof(I8Block))); }

// s[t][g] = the start of token t's block + Σ over quads [from, to) of code(g, quad) · a.code. A dot waits for the one before it in its
// chain, so that n · G chains are under way together, and twice as many where these are few.
template <int n, int G, int from, int to, class Code, class Dot>
inline void add_dots(Code code, const std::byte* acts, int half, i32x16 (&s)[n][G], Dot dot) {
  constexpr int parts = n * G * 8 <= dot_chains ? 2 : 1;
  i32x16 part[parts][n][G];
#pragma GCC unroll 16
  for (int t = 0; t < n; ++t)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      part[0][t][g] = half < 0 ? splat_i32(0) : splat_i32(block_of(acts, t).start[half]);
      if constexpr (parts == 2) part[1][t][g] = splat_i32(0);
    }
#pragma GCC unroll 8
  for (int q = from; q < to; ++q) {
    bytes64 w[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) w[g] = code(g, q);
#pragma GCC unroll 16
    for (int t = 0; t < n; ++t)
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) part[q % parts][t][g] = dot(part[q % parts][t][g], w[g], block_of(acts, t).code + 4 * q);
  }
#pragma GCC unroll 16
  for (int t = 0; t < n; ++t)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      s[t][g] = part[0][t][g];
      if constexpr (parts == 2) s[t][g] = s[t][g] + part[1][t][g];
    }
}

// Calls f.template operator()<n>(first, acts of first) for the tokens of a tile, n at a time.
template <int T, int G, class F>
inline void for_chains(const std::byte* acts, F f) {
  constexpr int most = dot_chains / G > 1 ? dot_chains / G : 1, n = T < most ? T : most;
#pragma GCC unroll 16
  for (int t = 0; t < T; t += n) f.template operator()<n>(t, acts + t * int(sizeof(I8Block)));
}

constexpr auto plain_dot = [](i32x16 s, bytes64 u, const int8_t* a) { return dot_u8(s, u, a); };
constexpr auto biased_dot = [](i32x16 s, bytes64 u, const int8_t* a) { return dot_code(s, u, a); };

// sums += scale · a.scale · Σ (code - offset) · a.code, over the 32 columns of a block
template <int T, int G, class Code, class Dot>
inline void add_scaled(Code code, const f32x16 (&scale)[G], const std::byte* acts, Sums<T, G>& sums, Dot dot) {
  for_chains<T, G>(acts, [&]<int n>(int first, const std::byte* a) {
    i32x16 s[n][G];
    add_dots<n, G, 0, 8>(code, a, 0, s, dot);
    Sums<n, G>::each([&](int t, int g) {
      sums.set(first + t, g, fma(to_f32(s[t][g]), scale[g] * splat(block_of(a, t).scale), sums.get(first + t, g)));
    });
  });
}

// sums += scale · a.scale · Σ code · a.code + min · a.sum
template <int T, int G, class Code>
inline void add_affine(Code code, const f32x16 (&scale)[G], const f32x16 (&min)[G], const std::byte* acts, Sums<T, G>& sums) {
  for_chains<T, G>(acts, [&]<int n>(int first, const std::byte* a) {
    i32x16 s[n][G];
    add_dots<n, G, 0, 8>(code, a, -1, s, plain_dot);
    Sums<n, G>::each([&](int t, int g) {
      const I8Block& block = block_of(a, t);
      const f32x16 product = fma(to_f32(s[t][g]), scale[g] * splat(block.scale), sums.get(first + t, g));
      sums.set(first + t, g, fma(min[g], splat(block.sum), product));
    });
  });
}

// sums += a.scale · Σ over both halves of scale · Σ (code - offset) · a.code
template <int T, int G, class Code>
inline void add_halves(Code code, const f32x16 (&scale0)[G], const f32x16 (&scale1)[G], const std::byte* acts, Sums<T, G>& sums) {
  for_chains<T, G>(acts, [&]<int n>(int first, const std::byte* a) {
    i32x16 s[n][G];
    f32x16 low[n][G];
    add_dots<n, G, 0, 4>(code, a, 0, s, plain_dot);
    Sums<n, G>::each([&](int t, int g) { low[t][g] = to_f32(s[t][g]) * scale0[g]; });
    add_dots<n, G, 4, 8>(code, a, 1, s, plain_dot);
    Sums<n, G>::each([&](int t, int g) {
      const f32x16 both = fma(to_f32(s[t][g]), scale1[g], low[t][g]);
      sums.set(first + t, g, fma(both, splat(block_of(a, t).scale), sums.get(first + t, g)));
    });
  });
}

inline bytes64 low_nibbles(bytes64 v) { return v & splat_bytes(15); }
inline bytes64 high_nibbles(bytes64 v) { return shift_right_bits<4>(v) & splat_bytes(15); }

// values[g] of each group
template <int G, class F>
inline void for_groups_of(f32x16 (&values)[G], F f) {
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g) values[g] = f(g);
}

// Weights that each group will meet in a while, brought into the second-level cache a few lines at a time: many at once would hold up
// the loads.
template <int G>
struct Ahead {
  const std::byte* at[G];  // null for none

  // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the call.
  [[gnu::always_inline]] void fetch(int bytes, int part) const {
    if (!at[0]) return;
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 32
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at[g] + part * bytes + i, 0, 2);
  }
};

// Tokens of a tile and groups of rows for types whose products are int8 dots.
constexpr int dot_tile = vector_registers < 16 ? 4 : 8, dot_groups = vector_registers < 32 ? 1 : 2;

// A format's multiply adds one unit's columns to the sums; `acts` is the unit's first record.
struct Q4_0 {
  static constexpr DType type = DType::q4_0;
  static constexpr ActFormat acts = {ActKind::i8, 8, false, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  static bytes64 code(const std::byte* p, int q) {
    const bytes64 v = load_bytes(p + 64 * (q % 4));
    return q < 4 ? low_nibbles(v) : high_nibbles(v);
  }
  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(576, 0);
    for (int b = 0; b < 2; ++b) {
      f32x16 scale[G];
      for_groups_of(scale, [&](int g) { return load_f16(halves_at(w[g] + 32 * b)); });
      add_scaled([=](int g, int q) { return code(w[g] + 64 + 256 * b, q); }, scale, acts + b * T * sizeof(I8Block), sums, plain_dot);
    }
  }
};

struct Q4_1 {
  static constexpr DType type = DType::q4_1;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(640, 0);
    for (int b = 0; b < 2; ++b) {
      f32x16 scale[G], min[G];
      for_groups_of(scale, [&](int g) { return load_f16(halves_at(w[g] + 32 * b)); });
      for_groups_of(min, [&](int g) { return load_f16(halves_at(w[g] + 64 + 32 * b)); });
      add_affine([=](int g, int q) { return Q4_0::code(w[g] + 128 + 256 * b, q); }, scale, min, acts + b * T * sizeof(I8Block), sums);
    }
  }
};

struct Q8_0 {
  static constexpr DType type = DType::q8_0;
  static constexpr ActFormat acts = {ActKind::i8, code_bias, false, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    for (int b = 0; b < 2; ++b) {
      ahead.fetch(544, b);
      f32x16 scale[G];
      for_groups_of(scale, [&](int g) { return load_f16(halves_at(w[g] + 32 * b)); });
      add_scaled([=](int g, int q) { return load_bytes(w[g] + 64 + 512 * b + 64 * q); }, scale, acts + b * T * sizeof(I8Block), sums,
                 biased_dot);
    }
  }
};

// Scales and minima of the eight blocks of a Q4_K or Q5_K unit.
template <int G>
struct KScales {
  f32x16 scale[8][G], min[8][G];

  explicit KScales(Groups<G> w) {
    for (int g = 0; g < G; ++g) {
      const f32x16 d = load_f16(halves_at(w[g])), dmin = zero_f32() - load_f16(halves_at(w[g] + 32));
      u8x16 s[12];
      for (int i = 0; i < 12; ++i) s[i] = load_u8x16(w[g] + 64 + 16 * i);
      const u8x16 six = splat_u8(63), four = splat_u8(15);
      for (int j = 0; j < 4; ++j) {
        scale[j][g] = d * widen_u8(s[j] & six);
        min[j][g] = dmin * widen_u8(s[j + 4] & six);
        scale[j + 4][g] = d * widen_u8((s[j + 8] & four) | shift_left_u8<4>(shift_right_u8<6>(s[j])));
        min[j + 4][g] = dmin * widen_u8(shift_right_u8<4>(s[j + 8]) | shift_left_u8<4>(shift_right_u8<6>(s[j + 4])));
      }
    }
  }
};

struct Q4_K {
  static constexpr DType type = DType::q4_k;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    const KScales<G> k(w);
    constexpr int step = T * int(sizeof(I8Block));
    for (int pair = 0; pair < 4; ++pair) {
      ahead.fetch(576, pair);
      const int at = 256 + 512 * pair, j = 2 * pair;
      add_affine([=](int g, int q) { return low_nibbles(load_bytes(w[g] + at + 64 * q)); }, k.scale[j], k.min[j], acts + j * step, sums);
      add_affine([=](int g, int q) { return high_nibbles(load_bytes(w[g] + at + 64 * q)); }, k.scale[j + 1], k.min[j + 1],
                 acts + (j + 1) * step, sums);
    }
  }
};

struct Q5_K {
  static constexpr DType type = DType::q5_k;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  // The fifth bit of block j is bit j of the high bytes.
  template <int j>
  static bytes64 fifth(bytes64 high) {
    if constexpr (j < 4)
      return shift_left_bits<4 - j>(high) & splat_bytes(16);
    else
      return shift_right_bits<j - 4>(high) & splat_bytes(16);
  }
  template <int j, int T, int G>
  static void block(Groups<G> w, const KScales<G>& k, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(352, j);
    const auto code = [=](int g, int q) {
      const bytes64 v = load_bytes(w[g] + 768 + 512 * (j / 2) + 64 * q);
      return (j % 2 ? high_nibbles(v) : low_nibbles(v)) | fifth<j>(load_bytes(w[g] + 256 + 64 * q));
    };
    add_affine(code, k.scale[j], k.min[j], acts + j * T * int(sizeof(I8Block)), sums);
  }
  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    const KScales<G> k(w);
    [&]<int... j>(std::integer_sequence<int, j...>) { (block<j>(w, k, acts, sums, ahead), ...); }
    (std::make_integer_sequence<int, 8>());
  }
};

struct Q6_K {
  static constexpr DType type = DType::q6_k;
  static constexpr ActFormat acts = {ActKind::i8, 32, true, sizeof(I8Block), dot_tile};
  static constexpr int groups = dot_groups;

  // Bits 2 · quarter and up of the high bytes are bits 4 and 5 of the codes.
  template <int quarter>
  static bytes64 top_bits(bytes64 high) {
    if constexpr (quarter < 2)
      return shift_left_bits<4 - 2 * quarter>(high) & splat_bytes(0x30);
    else
      return shift_right_bits<2 * quarter - 4>(high) & splat_bytes(0x30);
  }
  template <int quarter, int T, int G>
  static void block(Groups<G> w, int half, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(420, 4 * half + quarter);
    const int low = 1024 * half + 512 * (quarter % 2), high = 2048 + 512 * half, scales = 3072 + 128 * half + 32 * quarter;
    const auto code = [=](int g, int q) {
      const bytes64 v = load_bytes(w[g] + low + 64 * q);
      return (quarter < 2 ? low_nibbles(v) : high_nibbles(v)) | top_bits<quarter>(load_bytes(w[g] + high + 64 * q));
    };
    f32x16 scale0[G], scale1[G];
    for_groups_of(scale0, [&](int g) { return load_f16(halves_at(w[g] + 3328)) * widen_i8(load_u8x16(w[g] + scales)); });
    for_groups_of(scale1, [&](int g) { return load_f16(halves_at(w[g] + 3328)) * widen_i8(load_u8x16(w[g] + scales + 16)); });
    add_halves(code, scale0, scale1, acts + quarter * T * int(sizeof(I8Block)), sums);
  }
  template <int T, int G>
  static void multiply(Groups<G> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    for (int half = 0; half < 2; ++half, acts += 4 * T * sizeof(I8Block)) {
      block<0>(w, half, acts, sums, ahead), block<1>(w, half, acts, sums, ahead);
      block<2>(w, half, acts, sums, ahead), block<3>(w, half, acts, sums, ahead);
    }
  }
};

// Plain types: a block starts from zero, so that consecutive blocks overlap in the pipeline although each is one chain.
template <int T, class Step>
inline void add_block(Sums<T, 1>& sums, int steps, Step step) {
  f32x16 s[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) s[t] = zero_f32();
#pragma GCC unroll 4
  for (int k = 0; k < steps; ++k) step(k, s);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums.set(t, 0, sums.get(t, 0) + s[t]);
}

struct F32 {
  static constexpr DType type = DType::f32;
  static constexpr ActFormat acts = {ActKind::f32, 0, false, 128, vector_registers / 4};
  static constexpr int groups = 1;

  template <int T, int G>
  static void multiply(Groups<1> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(2048, 0);
    add_block(sums, 32, [&](int k, f32x16(&s)[T]) {
      const f32x16 column = load(floats_at(w[0]) + 16 * k);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s[t] = fma(column, splat(floats_at(acts)[32 * t + k]), s[t]);
    });
  }
};

struct F16 {
  static constexpr DType type = DType::f16;
  static constexpr ActFormat acts = {ActKind::f32, 0, false, 128, vector_registers / 4};
  static constexpr int groups = 1;

  template <int T, int G>
  static void multiply(Groups<1> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(1024, 0);
    add_block(sums, 32, [&](int k, f32x16(&s)[T]) {
      const f32x16 column = load_f16(halves_at(w[0]) + 16 * k);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s[t] = fma(column, splat(floats_at(acts)[32 * t + k]), s[t]);
    });
  }
};

// With bf16 dots the activations are bf16 too; without, weights are widened and the product is f32.
struct BF16 {
  static constexpr DType type = DType::bf16;
  static constexpr ActFormat acts = isa_has_bf16 ? ActFormat{ActKind::bf16, 0, false, 64, vector_registers / 4}
                                                 : ActFormat{ActKind::f32, 0, false, 128, vector_registers / 4};
  static constexpr int groups = 1;

  template <int T, int G>
  static void multiply(Groups<1> w, const std::byte* acts, Sums<T, G>& sums, Ahead<G> ahead) {
    ahead.fetch(1024, 0);
    add_block(sums, 16, [&](int k, f32x16(&s)[T]) {
      const bf16x32 pair = load_bf16x32(halves_at(w[0]) + 32 * k);
      if constexpr (isa_has_bf16) {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) s[t] = dot_bf16(s[t], pair, splat_bf16_pair(halves_at(acts) + 32 * t + 2 * k));
      } else {
        const f32x16 even = widen_even(pair), odd = widen_odd(pair);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          const float* a = floats_at(acts) + 32 * t + 2 * k;
          s[t] = fma(odd, splat(a[1]), fma(even, splat(a[0]), s[t]));
        }
      }
    });
  }
};

constexpr int64_t weights_ahead = 8192;  // ahead of the unit at work: about the latency of memory at a core's share of bandwidth

// Of G groups at work on the unit at w, the first's, whose row ends at row_end.
template <int G>
inline Ahead<G> ahead_of(const Product& p, const std::byte* w, const std::byte* row_end) {
  const std::byte* const end = p.weights + p.groups * p.group_bytes;
  Ahead<G> ahead{};
  for (int g = 0; g < G && p.fetch; ++g) {
    const std::byte* at = w + weights_ahead / G;
    at += (at < row_end ? g : g + G - 1) * p.group_bytes;  // a row that ends goes on G rows further
    ahead.at[g] = at < end || !p.next ? at : at + (p.next - end);
  }
  return ahead;
}

// Groups [first, first + G).
template <class Format, int T, int G>
inline void product_groups(const Product& p, int64_t first) {
  constexpr PackedFormat packed = packed_format(Format::type);
  constexpr int64_t unit_acts = int64_t(packed.unit_cols / act_block) * T * Format::acts.block_bytes;
  const std::byte *w = p.weights + first * p.group_bytes, *acts = p.acts;
  const std::byte* const row_end = w + p.group_bytes;
  Sums<T, G> sums(p.out + 16 * first, p.stride);
  for (int64_t u = 0; u < p.units; ++u, w += packed.unit_bytes, acts += unit_acts)
    Format::template multiply<T, G>(Groups<G>{w, p.group_bytes}, acts, sums, ahead_of<G>(p, w, row_end));
  sums.finish();
}

template <class Format, int T>
void product_tile(const Product& p) {
  int64_t g = 0;
  if constexpr (Format::groups == 2 && T >= 4)
    for (; g + 2 <= p.groups; g += 2) product_groups<Format, T, 2>(p, g);
  for (; g < p.groups; ++g) product_groups<Format, T, 1>(p, g);
}

template <class Format>
void product(const Product& p) {
  constexpr int most = Format::acts.tile;
  if (p.tokens == 1) return product_tile<Format, 1>(p);
  if (p.tokens == 2) return product_tile<Format, 2>(p);
  if constexpr (most >= 4) {
    if (p.tokens == 4) return product_tile<Format, 4>(p);
  }
  if constexpr (most >= 8) {
    if (p.tokens == 8) return product_tile<Format, 8>(p);
  }
}

// Quantises 32 floats to codes in ±127 with scale max|x| / 127.
inline void write_i8(const ActFormat& format, f32x16 x0, f32x16 x1, I8Block& block) {
  const float most = top(max(abs(x0), abs(x1)));
  const float scale = most * (1.0f / 127), inverse = most > 0 ? 127 / most : 0;
  const f32x16 limit = splat(127), least = splat(-127);
  const f32x16 c0 = to_f32(to_i32(max(min(x0 * splat(inverse), limit), least)));
  const f32x16 c1 = to_f32(to_i32(max(min(x1 * splat(inverse), limit), least)));
  store_i8(block.code, c0), store_i8(block.code + 16, c1);
  block.scale = scale;
  block.unused = 0;
  if (format.kind == ActKind::i8_affine) {
    block.start[1] = 0;
    block.sum = scale * sum(c0 + c1);
  } else if (format.halves) {
    block.start[0] = -format.offset * int32_t(sum(c0)), block.start[1] = -format.offset * int32_t(sum(c1));
  } else {
    block.start[0] = -format.offset * int32_t(sum(c0 + c1)), block.start[1] = 0;
  }
}

inline void write_vectors(const ActFormat& format, f32x16 x0, f32x16 x1, std::byte* record) {
  switch (format.kind) {
    case ActKind::f32:
      store(reinterpret_cast<float*>(record), x0);
      store(reinterpret_cast<float*>(record) + 16, x1);
      return;
    case ActKind::bf16: return store_bf16x32(reinterpret_cast<uint16_t*>(record), to_bf16x32(x0, x1));
    case ActKind::i8:
    case ActKind::i8_affine: return write_i8(format, x0, x1, *reinterpret_cast<I8Block*>(record));
  }
}

void write_row(const ActFormat& format, const float* x, int64_t cols, int64_t blocks, std::byte* record, int64_t step) {
  for (int64_t b = 0; b < blocks; ++b, record += step) {
    const int64_t left = cols - b * act_block;
    const float* at = x + b * act_block;
    if (left >= act_block)
      write_vectors(format, load(at), load(at + 16), record);
    else if (left > 0)
      write_vectors(format, load(at, left < 16 ? int(left) : 16), left > 16 ? load(at + 16, int(left) - 16) : zero_f32(), record);
    else
      write_vectors(format, zero_f32(), zero_f32(), record);
  }
}

template <class Format>
constexpr void add_format(Kernels& k) {
  k.acts[int(Format::type)] = Format::acts;
  k.product[int(Format::type)] = product<Format>;
}

constexpr void add_linear(Kernels& k) {
  add_format<F32>(k), add_format<F16>(k), add_format<BF16>(k);
  add_format<Q8_0>(k), add_format<Q4_0>(k), add_format<Q4_1>(k), add_format<Q4_K>(k), add_format<Q5_K>(k), add_format<Q6_K>(k);
  k.write_row = write_row;
}

}  // namespace
}  // namespace mla
