// Products of packed weights with activations. Every output element is summed over blocks of 32 columns in one order, whatever the
// number of tokens beside it, so that results do not depend on the batch, the tiling or the threads.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/simd.h"

namespace mla {
namespace {

inline const uint16_t* halves_at(const std::byte* p) { return reinterpret_cast<const uint16_t*>(p); }
inline const float* floats_at(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline const I8Block& i8_at(const std::byte* p) { return *reinterpret_cast<const I8Block*>(p); }

// Eight vectors of four columns each: the codes of 32 columns of sixteen rows.
struct Codes {
  bytes64 quad[8];
};

// acc[t] += scale · a.scale · Σ (code - offset) · a.code
template <int T, class Dot>
inline void add_scaled(const Codes& w, f32x16 scale, const std::byte* acts, f32x16 (&acc)[T], Dot dot) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const I8Block& a = i8_at(acts + t * int(sizeof(I8Block)));
    i32x16 s = splat_i32(a.start[0]);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) s = dot(s, w.quad[q], a.code + 4 * q);
    acc[t] = fma(to_f32(s), scale * splat(a.scale), acc[t]);
  }
}

// acc[t] += scale · a.scale · Σ code · a.code + min · a.sum
template <int T>
inline void add_affine(const Codes& w, f32x16 scale, f32x16 min, const std::byte* acts, f32x16 (&acc)[T]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const I8Block& a = i8_at(acts + t * int(sizeof(I8Block)));
    i32x16 s = splat_i32(0);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) s = dot_u8(s, w.quad[q], a.code + 4 * q);
    acc[t] = fma(min, splat(a.sum), fma(to_f32(s), scale * splat(a.scale), acc[t]));
  }
}

// The same with a scale for each half of the block.
template <int T>
inline void add_halves(const Codes& w, f32x16 scale0, f32x16 scale1, const std::byte* acts, f32x16 (&acc)[T]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const I8Block& a = i8_at(acts + t * int(sizeof(I8Block)));
    i32x16 s0 = splat_i32(a.start[0]), s1 = splat_i32(a.start[1]);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      s0 = dot_u8(s0, w.quad[q], a.code + 4 * q);
      s1 = dot_u8(s1, w.quad[q + 4], a.code + 4 * (q + 4));
    }
    acc[t] = fma(fma(to_f32(s1), scale1, to_f32(s0) * scale0), splat(a.scale), acc[t]);
  }
}

inline bytes64 low_nibbles(bytes64 v) { return v & splat_bytes(15); }
inline bytes64 high_nibbles(bytes64 v) { return shift_right_bits<4>(v) & splat_bytes(15); }

// Weights that will be met in a while, brought into the second-level cache a few lines at a time: many at once would hold up the loads.
struct Ahead {
  const std::byte* at;  // null for none

  template <int bytes>
  void fetch(int part) const {
    if (!at) return;
#pragma GCC unroll 32
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + part * bytes + i, 0, 2);
  }
};

// A format's multiply adds one unit's columns to acc; `acts` is the unit's first record.
struct Q4_0 {
  static constexpr DType type = DType::q4_0;
  static constexpr ActFormat acts = {ActKind::i8, 8, false, sizeof(I8Block), vector_registers / 2};

  static Codes codes(const std::byte* p) {
    Codes w;
    for (int q = 0; q < 4; ++q) {
      const bytes64 v = load_bytes(p + 64 * q);
      w.quad[q] = low_nibbles(v), w.quad[q + 4] = high_nibbles(v);
    }
    return w;
  }
  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<576>(0);
    for (int b = 0; b < 2; ++b)
      add_scaled(codes(w + 64 + 256 * b), load_f16(halves_at(w + 32 * b)), acts + b * T * sizeof(I8Block), acc,
                 [](i32x16 s, bytes64 u, const int8_t* a) { return dot_u8(s, u, a); });
  }
};

struct Q4_1 {
  static constexpr DType type = DType::q4_1;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), vector_registers / 2};

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<640>(0);
    for (int b = 0; b < 2; ++b)
      add_affine(Q4_0::codes(w + 128 + 256 * b), load_f16(halves_at(w + 32 * b)), load_f16(halves_at(w + 64 + 32 * b)),
                 acts + b * T * sizeof(I8Block), acc);
  }
};

struct Q8_0 {
  static constexpr DType type = DType::q8_0;
  static constexpr ActFormat acts = {ActKind::i8, code_bias, false, sizeof(I8Block), vector_registers / 2};

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    for (int b = 0; b < 2; ++b) {
      ahead.fetch<544>(b);
      Codes c;
      for (int q = 0; q < 8; ++q) c.quad[q] = load_bytes(w + 64 + 512 * b + 64 * q);
      add_scaled(c, load_f16(halves_at(w + 32 * b)), acts + b * T * sizeof(I8Block), acc,
                 [](i32x16 s, bytes64 u, const int8_t* a) { return dot_code(s, u, a); });
    }
  }
};

// Scales and minima of the eight blocks of a Q4_K or Q5_K unit.
struct KScales {
  f32x16 scale[8], min[8];

  explicit KScales(const std::byte* w) {
    const f32x16 d = load_f16(halves_at(w)), dmin = zero_f32() - load_f16(halves_at(w + 32));
    u8x16 s[12];
    for (int i = 0; i < 12; ++i) s[i] = load_u8x16(w + 64 + 16 * i);
    const u8x16 six = splat_u8(63), four = splat_u8(15);
    for (int j = 0; j < 4; ++j) {
      scale[j] = d * widen_u8(s[j] & six);
      min[j] = dmin * widen_u8(s[j + 4] & six);
      scale[j + 4] = d * widen_u8((s[j + 8] & four) | shift_left_u8<4>(shift_right_u8<6>(s[j])));
      min[j + 4] = dmin * widen_u8(shift_right_u8<4>(s[j + 8]) | shift_left_u8<4>(shift_right_u8<6>(s[j + 4])));
    }
  }
};

struct Q4_K {
  static constexpr DType type = DType::q4_k;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), vector_registers / 2};

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    const KScales k(w);
    constexpr int step = T * int(sizeof(I8Block));
    for (int pair = 0; pair < 4; ++pair) {
      ahead.fetch<576>(pair);
      const std::byte* p = w + 256 + 512 * pair;
      Codes c;
      for (int q = 0; q < 8; ++q) c.quad[q] = low_nibbles(load_bytes(p + 64 * q));
      add_affine(c, k.scale[2 * pair], k.min[2 * pair], acts + 2 * pair * step, acc);
      for (int q = 0; q < 8; ++q) c.quad[q] = high_nibbles(load_bytes(p + 64 * q));
      add_affine(c, k.scale[2 * pair + 1], k.min[2 * pair + 1], acts + (2 * pair + 1) * step, acc);
    }
  }
};

struct Q5_K {
  static constexpr DType type = DType::q5_k;
  static constexpr ActFormat acts = {ActKind::i8_affine, 0, false, sizeof(I8Block), vector_registers / 2};

  // The fifth bit of block j is bit j of the high bytes.
  template <int j>
  static bytes64 fifth(bytes64 high) {
    if constexpr (j < 4)
      return shift_left_bits<4 - j>(high) & splat_bytes(16);
    else
      return shift_right_bits<j - 4>(high) & splat_bytes(16);
  }
  template <int j, int T>
  static void block(const std::byte* w, const KScales& k, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<352>(j);
    Codes c;
    for (int q = 0; q < 8; ++q) {
      const bytes64 v = load_bytes(w + 768 + 512 * (j / 2) + 64 * q);
      c.quad[q] = (j % 2 ? high_nibbles(v) : low_nibbles(v)) | fifth<j>(load_bytes(w + 256 + 64 * q));
    }
    add_affine(c, k.scale[j], k.min[j], acts + j * T * int(sizeof(I8Block)), acc);
  }
  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    const KScales k(w);
    block<0>(w, k, acts, acc, ahead), block<1>(w, k, acts, acc, ahead), block<2>(w, k, acts, acc, ahead), block<3>(w, k, acts, acc, ahead);
    block<4>(w, k, acts, acc, ahead), block<5>(w, k, acts, acc, ahead), block<6>(w, k, acts, acc, ahead), block<7>(w, k, acts, acc, ahead);
  }
};

struct Q6_K {
  static constexpr DType type = DType::q6_k;
  static constexpr ActFormat acts = {ActKind::i8, 32, true, sizeof(I8Block), vector_registers / 2};

  // Bits 2 · quarter and up of the high bytes are bits 4 and 5 of the codes.
  template <int quarter>
  static bytes64 top_bits(bytes64 high) {
    if constexpr (quarter < 2)
      return shift_left_bits<4 - 2 * quarter>(high) & splat_bytes(0x30);
    else
      return shift_right_bits<2 * quarter - 4>(high) & splat_bytes(0x30);
  }
  template <int quarter, int T>
  static void block(const std::byte* w, int half, f32x16 d, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<420>(4 * half + quarter);
    const std::byte *low = w + 1024 * half + 512 * (quarter % 2), *high = w + 2048 + 512 * half;
    const std::byte* scales = w + 3072 + 128 * half + 32 * quarter;
    Codes c;
    for (int q = 0; q < 8; ++q) {
      const bytes64 v = load_bytes(low + 64 * q);
      c.quad[q] = (quarter < 2 ? low_nibbles(v) : high_nibbles(v)) | top_bits<quarter>(load_bytes(high + 64 * q));
    }
    add_halves(c, d * widen_i8(load_u8x16(scales)), d * widen_i8(load_u8x16(scales + 16)), acts + quarter * T * int(sizeof(I8Block)), acc);
  }
  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    const f32x16 d = load_f16(halves_at(w + 3328));
    for (int half = 0; half < 2; ++half, acts += 4 * T * sizeof(I8Block)) {
      block<0>(w, half, d, acts, acc, ahead), block<1>(w, half, d, acts, acc, ahead);
      block<2>(w, half, d, acts, acc, ahead), block<3>(w, half, d, acts, acc, ahead);
    }
  }
};

// Plain types: a block starts from zero, so that consecutive blocks overlap in the pipeline although each is one chain.
template <class Format, int T, class Step>
inline void add_block(f32x16 (&acc)[T], int steps, Step step) {
  f32x16 s[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) s[t] = zero_f32();
#pragma GCC unroll 4
  for (int k = 0; k < steps; ++k) step(k, s);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = acc[t] + s[t];
}

struct F32 {
  static constexpr DType type = DType::f32;
  static constexpr ActFormat acts = {ActKind::f32, 0, false, 128, vector_registers / 4};

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<2048>(0);
    add_block<F32, T>(acc, 32, [&](int k, f32x16(&s)[T]) {
      const f32x16 column = load(floats_at(w) + 16 * k);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s[t] = fma(column, splat(floats_at(acts)[32 * t + k]), s[t]);
    });
  }
};

struct F16 {
  static constexpr DType type = DType::f16;
  static constexpr ActFormat acts = {ActKind::f32, 0, false, 128, vector_registers / 4};

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<1024>(0);
    add_block<F16, T>(acc, 32, [&](int k, f32x16(&s)[T]) {
      const f32x16 column = load_f16(halves_at(w) + 16 * k);
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

  template <int T>
  static void multiply(const std::byte* w, const std::byte* acts, f32x16 (&acc)[T], Ahead ahead) {
    ahead.fetch<1024>(0);
    add_block<BF16, T>(acc, 16, [&](int k, f32x16(&s)[T]) {
      const bf16x32 pair = load_bf16x32(halves_at(w) + 32 * k);
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

template <class Format, int T>
void product_tile(const Product& p) {
  constexpr PackedFormat packed = packed_format(Format::type);
  constexpr int64_t unit_acts = int64_t(packed.unit_cols / act_block) * T * Format::acts.block_bytes;
  const std::byte* w = p.weights;
  const std::byte* const end = w + p.groups * p.group_bytes;
  const int64_t jump = p.next ? p.next - end : 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    f32x16 acc[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = zero_f32();
    const std::byte* acts = p.acts;
    for (int64_t u = 0; u < p.units; ++u, w += packed.unit_bytes, acts += unit_acts) {
      const std::byte* ahead = w + weights_ahead < end ? w + weights_ahead : w + weights_ahead + jump;
      Format::template multiply<T>(w, acts, acc, {p.fetch ? ahead : nullptr});
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(p.out + t * p.stride + 16 * g, acc[t]);
  }
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
  if constexpr (most >= 16) {
    if (p.tokens == 16) return product_tile<Format, 16>(p);
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
