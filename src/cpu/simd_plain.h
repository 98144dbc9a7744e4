// simd.h in plain C++, for machines without a leaf of their own: four of the compiler's 128-bit vectors for each one of ours.
#pragma once

#include "core/dtype.h"

#include <cmath>

namespace mla {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint8_t u8x16_raw __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

struct f32x16 {
  f32x4 p[4];
};
struct i32x16 {
  i32x4 p[4];
};
struct u8x16 {
  u8x16_raw v;
};
struct bytes64 {
  u16x8 p[4];
};
struct bf16x32 {
  u32x4 p[4];
};
struct i16x32 {
  i32x4 p[4];  // pairs
};

constexpr bool isa_has_bf16 = false, isa_has_i16 = false;
constexpr int code_bias = 128;
constexpr int vector_registers = 8;  // as small tiles as pay, since each vector takes four registers
constexpr int dot_chains = 1;

template <class To, class From>
inline To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
// Applies f to the four parts of vectors.
template <class Out, class F, class... In>
inline Out each(F f, const In&... x) {
  Out y;
  for (int i = 0; i < 4; ++i) y.p[i] = f(x.p[i]...);
  return y;
}

inline f32x16 splat(float x) {
  const f32x4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
inline f32x16 zero_f32() { return splat(0); }
inline f32x16 load(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline f32x16 load(const float* p, int n) {
  f32x16 x = zero_f32();
  std::memcpy(&x, p, size_t(n) * 4);
  return x;
}
inline void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
inline void store(float* p, f32x16 x, int n) { std::memcpy(p, &x, size_t(n) * 4); }
inline f32x16 operator+(f32x16 x, f32x16 y) {
  return each<f32x16>([](f32x4 a, f32x4 b) { return a + b; }, x, y);
}
inline f32x16 operator-(f32x16 x, f32x16 y) {
  return each<f32x16>([](f32x4 a, f32x4 b) { return a - b; }, x, y);
}
inline f32x16 operator*(f32x16 x, f32x16 y) {
  return each<f32x16>([](f32x4 a, f32x4 b) { return a * b; }, x, y);
}
inline f32x16 operator/(f32x16 x, f32x16 y) {
  return each<f32x16>([](f32x4 a, f32x4 b) { return a / b; }, x, y);
}
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) { return x * y + z; }
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return each<f32x16>([](f32x4 p, f32x4 q, f32x4 r, f32x4 s) { return p < q ? r : s; }, a, b, x, y);
}
inline f32x16 max(f32x16 x, f32x16 y) { return where_less(y, x, x, y); }
inline f32x16 min(f32x16 x, f32x16 y) { return where_less(x, y, x, y); }
inline f32x16 abs(f32x16 x) {
  return each<f32x16>([](f32x4 a) { return bits_as<f32x4>(bits_as<u32x4>(a) & 0x7fffffffu); }, x);
}
inline f32x16 sqrt(f32x16 x) {
  return each<f32x16>([](f32x4 a) { return f32x4{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }, x);
}
inline float sum(f32x16 x) {
  const f32x4 v = (x.p[0] + x.p[1]) + (x.p[2] + x.p[3]);
  return (v[0] + v[1]) + (v[2] + v[3]);
}
inline float top(f32x16 x) {
  float best = x.p[0][0];
  for (int i = 0; i < 16; ++i) best = x.p[i / 4][i % 4] > best ? x.p[i / 4][i % 4] : best;
  return best;
}

inline i32x16 splat_i32(int32_t x) {
  const i32x4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
inline i32x16 load_i32(const int32_t* p) {
  i32x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline i32x16 operator+(i32x16 x, i32x16 y) {
  return each<i32x16>([](i32x4 a, i32x4 b) { return a + b; }, x, y);
}
inline i32x16 operator-(i32x16 x, i32x16 y) {
  return each<i32x16>([](i32x4 a, i32x4 b) { return a - b; }, x, y);
}
template <int n>
inline i32x16 shift_left(i32x16 x) {
  return each<i32x16>([](i32x4 a) { return bits_as<i32x4>(bits_as<u32x4>(a) << n); }, x);
}
template <int n>
inline i32x16 shift_right(i32x16 x) {
  return each<i32x16>([](i32x4 a) { return a >> n; }, x);
}
inline f32x16 to_f32(i32x16 x) {
  return each<f32x16>([](i32x4 a) { return __builtin_convertvector(a, f32x4); }, x);
}
inline i32x16 to_i32(f32x16 x) {
  return each<i32x16>(
      [](f32x4 a) {
        // Adding 1.5 · 2^23 rounds to the nearest even whole number, for magnitudes below 2^22.
        const f32x4 magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
        const f32x4 shifted = a + magic;
        return __builtin_convertvector(shifted - magic, i32x4);
      },
      x);
}
inline f32x16 scale_2(f32x16 x, i32x16 n) {
  return each<f32x16>([](f32x4 a, i32x4 b) { return bits_as<f32x4>(bits_as<u32x4>(a) + (bits_as<u32x4>(b) << 23)); }, x, n);
}

inline u8x16 load_u8x16(const void* p) {
  u8x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline u8x16 splat_u8(uint8_t x) {
  u8x16 y;
  std::memset(&y, x, sizeof y);
  return y;
}
inline u8x16 operator&(u8x16 x, u8x16 y) { return {x.v & y.v}; }
inline u8x16 operator|(u8x16 x, u8x16 y) { return {x.v | y.v}; }
template <int n>
inline u8x16 shift_right_u8(u8x16 x) {
  return {x.v >> n};
}
template <int n>
inline u8x16 shift_left_u8(u8x16 x) {
  return {x.v << n};
}
inline f32x16 widen_u8(u8x16 x) {
  f32x16 y;
  for (int i = 0; i < 16; ++i) y.p[i / 4][i % 4] = float(x.v[i]);
  return y;
}
inline f32x16 widen_i8(u8x16 x) {
  f32x16 y;
  for (int i = 0; i < 16; ++i) y.p[i / 4][i % 4] = float(int8_t(x.v[i]));
  return y;
}

inline bytes64 load_bytes(const void* p) {
  bytes64 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
// Makes x new to the compiler, at no cost.
inline void renew(bytes64& x) { asm volatile("" : "+m"(x)); }
inline void renew(i16x32& x) { asm volatile("" : "+m"(x)); }
inline bytes64 splat_bytes(uint8_t b) {
  bytes64 x;
  std::memset(&x, b, sizeof x);
  return x;
}
inline bytes64 operator&(bytes64 x, bytes64 y) {
  return each<bytes64>([](u16x8 a, u16x8 b) { return a & b; }, x, y);
}
inline bytes64 operator|(bytes64 x, bytes64 y) {
  return each<bytes64>([](u16x8 a, u16x8 b) { return a | b; }, x, y);
}
template <int n>
inline bytes64 shift_right_bits(bytes64 x) {
  return each<bytes64>([](u16x8 a) { return a >> n; }, x);
}
template <int n>
inline bytes64 shift_left_bits(bytes64 x) {
  return each<bytes64>([](u16x8 a) { return a << n; }, x);
}

inline i32x16 dot_u8(i32x16 acc, bytes64 u, bytes64 s) {
  uint8_t a[64];
  int8_t b[64];
  int32_t y[16];
  std::memcpy(a, &u, 64), std::memcpy(b, &s, 64), std::memcpy(y, &acc, 64);
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < 4; ++c) y[i] += a[4 * i + c] * b[4 * i + c];
  return load_i32(y);
}
inline i32x16 dot_u8(i32x16 acc, bytes64 u, const int8_t* s4) {
  // Even and odd bytes as 16-bit numbers; products are below 2^15 in magnitude for codes up to 127, so they are widened first.
  const int32_t s0 = s4[0], s1 = s4[1], s2 = s4[2], s3 = s4[3];
  return each<i32x16>(
      [=](u16x8 part, i32x4 y) {
        const u32x4 w = bits_as<u32x4>(part);
        const i32x4 w0 = bits_as<i32x4>(w & 255u), w1 = bits_as<i32x4>((w >> 8) & 255u), w2 = bits_as<i32x4>((w >> 16) & 255u),
                    w3 = bits_as<i32x4>(w >> 24);
        return y + w0 * s0 + w1 * s1 + w2 * s2 + w3 * s3;
      },
      u, acc);
}
inline i32x16 dot_code(i32x16 acc, bytes64 u, const int8_t* s4) { return dot_u8(acc, u, s4); }

inline f32x16 load_f16(const uint16_t* p, int n) {
  f32x16 x = zero_f32();
  for (int i = 0; i < n; ++i) x.p[i / 4][i % 4] = f16_to_f32(p[i]);
  return x;
}
inline f32x16 load_f16(const uint16_t* p) { return load_f16(p, 16); }
inline f32x16 load_bf16(const uint16_t* p, int n) {
  f32x16 x = zero_f32();
  for (int i = 0; i < n; ++i) x.p[i / 4][i % 4] = bf16_to_f32(p[i]);
  return x;
}
inline f32x16 load_bf16(const uint16_t* p) { return load_bf16(p, 16); }
inline f32x16 load_i8(const int8_t* p, int n) {
  f32x16 x = zero_f32();
  for (int i = 0; i < n; ++i) x.p[i / 4][i % 4] = float(p[i]);
  return x;
}
inline f32x16 load_i8(const int8_t* p) { return load_i8(p, 16); }
inline void store_bf16(uint16_t* p, f32x16 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_bf16(x.p[i / 4][i % 4]);
}
inline void store_bf16(uint16_t* p, f32x16 x) { store_bf16(p, x, 16); }
inline void store_f16(uint16_t* p, f32x16 x, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_f16(x.p[i / 4][i % 4]);
}
inline void store_f16(uint16_t* p, f32x16 x) { store_f16(p, x, 16); }
inline void store_i8(int8_t* p, f32x16 x, int n) {
  const i32x16 y = to_i32(x);
  for (int i = 0; i < n; ++i) p[i] = int8_t(y.p[i / 4][i % 4]);
}
inline void store_i8(int8_t* p, f32x16 x) { store_i8(p, x, 16); }

inline bf16x32 load_bf16x32(const uint16_t* p) {
  bf16x32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_bf16x32(uint16_t* p, bf16x32 x) { std::memcpy(p, &x, sizeof x); }
inline bf16x32 splat_bf16_pair(const uint16_t* p) {
  uint32_t two;
  std::memcpy(&two, p, 4);
  const u32x4 v = {two, two, two, two};
  return {{v, v, v, v}};
}
inline bf16x32 to_bf16x32(f32x16 low, f32x16 high) {
  uint16_t t[32];
  store_bf16(t, low), store_bf16(t + 16, high);
  return load_bf16x32(t);
}
// Elements 0, 2, 4 … and 1, 3, 5 … (little-endian words).
inline f32x16 widen_even(bf16x32 x) {
  return each<f32x16>([](u32x4 a) { return bits_as<f32x4>(a << 16); }, x);
}
inline f32x16 widen_odd(bf16x32 x) {
  return each<f32x16>([](u32x4 a) { return bits_as<f32x4>(a & 0xffff0000u); }, x);
}
inline f32x16 dot_bf16(f32x16 acc, bf16x32 a, bf16x32 b) { return fma(widen_odd(a), widen_odd(b), fma(widen_even(a), widen_even(b), acc)); }

inline bf16x32 max_magnitude(bf16x32 x, bf16x32 y) {
  uint16_t a[32], b[32];
  store_bf16x32(a, x), store_bf16x32(b, y);
  for (int i = 0; i < 32; ++i) a[i] = (b[i] & 0x7fff) > a[i] ? b[i] & 0x7fff : a[i];
  return load_bf16x32(a);
}

// a[0] b[0] a[1] b[1] …: the first 16 pairs, and the last.
inline bf16x32 interleave_low(bf16x32 a, bf16x32 b) {
  uint16_t x[32], y[32], z[32];
  store_bf16x32(x, a), store_bf16x32(y, b);
  for (int i = 0; i < 16; ++i) z[2 * i] = x[i], z[2 * i + 1] = y[i];
  return load_bf16x32(z);
}
inline bf16x32 interleave_high(bf16x32 a, bf16x32 b) {
  uint16_t x[32], y[32], z[32];
  store_bf16x32(x, a), store_bf16x32(y, b);
  for (int i = 0; i < 16; ++i) z[2 * i] = x[16 + i], z[2 * i + 1] = y[16 + i];
  return load_bf16x32(z);
}
// Elements 2i from `even`, 2i + 1 from `odd`.
inline bf16x32 pair_bf16(f32x16 even, f32x16 odd) {
  uint16_t z[32];
  store_bf16(z, even), store_bf16(z + 16, odd);
  const bf16x32 both = load_bf16x32(z);
  std::memcpy(z, z + 16, 32);
  return interleave_low(both, load_bf16x32(z));
}

inline i16x32 load_i16x32(const int16_t* p) {
  i16x32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_i16x32(int16_t* p, i16x32 x) { std::memcpy(p, &x, sizeof x); }
inline i16x32 splat_i16_pair(const int16_t* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  const i32x4 v = {two, two, two, two};
  return {{v, v, v, v}};
}
inline i32x16 dot_i16(i32x16 acc, i16x32 a, i16x32 b) {
  i32x16 y;
  for (int i = 0; i < 4; ++i) y.p[i] = acc.p[i] + (a.p[i] >> 16) * (b.p[i] >> 16) + (a.p[i] << 16 >> 16) * (b.p[i] << 16 >> 16);
  return y;
}
inline void store_i16(int16_t* p, i32x16 x) {
  for (int i = 0; i < 16; ++i) p[i] = int16_t(x.p[i / 4][i % 4]);
}
inline i16x32 pair_i16(i32x16 even, i32x16 odd) {
  i16x32 y;
  for (int i = 0; i < 4; ++i) y.p[i] = (odd.p[i] << 16) | (even.p[i] & 0xffff);
  return y;
}
inline i16x32 interleave_low(i16x32 a, i16x32 b) { return bits_as<i16x32>(interleave_low(bits_as<bf16x32>(a), bits_as<bf16x32>(b))); }
inline i16x32 interleave_high(i16x32 a, i16x32 b) { return bits_as<i16x32>(interleave_high(bits_as<bf16x32>(a), bits_as<bf16x32>(b))); }

// Partial sums of a dot product.
using f32_dots = f32x16;
inline f32_dots zero_dots() { return zero_f32(); }
inline f32_dots add_dots(f32_dots acc, f32x16 x, f32x16 y) { return fma(x, y, acc); }
inline f32_dots add_dots(f32_dots acc, bf16x32 x, bf16x32 y) { return dot_bf16(acc, x, y); }
// Lane 4 q + i is the sum of lanes 4 q … 4 q + 3 of x_i.
inline f32x16 sum_quads(f32x16 x0, f32x16 x1, f32x16 x2, f32x16 x3) {
  return each<f32x16>(
      [](f32x4 a, f32x4 b, f32x4 c, f32x4 d) {
        return f32x4{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), (c[0] + c[1]) + (c[2] + c[3]),
                     (d[0] + d[1]) + (d[2] + d[3])};
      },
      x0, x1, x2, x3);
}
// Lane 4 k + i is the sum over q of lanes 4 q + i of x_k.
inline f32x16 sum_quarters(f32x16 x0, f32x16 x1, f32x16 x2, f32x16 x3) {
  auto fold = [](f32x16 x) { return (x.p[0] + x.p[1]) + (x.p[2] + x.p[3]); };
  return {{fold(x0), fold(x1), fold(x2), fold(x3)}};
}

inline void transpose(f32x16 (&x)[16]) {
  float from[16][16], to[16][16];
  for (int i = 0; i < 16; ++i) store(from[i], x[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i][j] = from[j][i];
  for (int i = 0; i < 16; ++i) x[i] = load(to[i]);
}

}  // namespace
}  // namespace mla
