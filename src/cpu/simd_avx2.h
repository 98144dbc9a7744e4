// simd.h for AVX2 with FMA and F16C: each 16-lane vector is two registers.
#pragma once

#include <immintrin.h>

namespace mla {
namespace {

struct f32x16 {
  __m256 a, b;
};
struct i32x16 {
  __m256i a, b;
};
struct u8x16 {
  __m128i v;
};
struct bytes64 {
  __m256i a, b;
};
struct bf16x32 {
  __m256i a, b;
};
struct i16x32 {
  __m256i a, b;
};

constexpr bool isa_has_bf16 = false, isa_has_i16 = true;
constexpr int code_bias = 0;  // dot_code takes the 128 off itself
constexpr int vector_registers = 16;
constexpr int dot_chains = 4;

inline const __m256i* as_vector(const void* p) { return static_cast<const __m256i*>(p); }
inline __m256i* as_vector(void* p) { return static_cast<__m256i*>(p); }

inline f32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
// Partial vectors go through memory: they are rare.
inline f32x16 load(const float* p, int n) {
  float t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
inline void store(float* p, f32x16 x, int n) {
  float t[16];
  store(t, x);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
inline f32x16 operator+(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline f32x16 operator-(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline f32x16 operator*(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline f32x16 operator/(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline f32x16 abs(f32x16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline f32x16 sqrt(f32x16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline float sum(f32x16 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float top(f32x16 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)), _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}

inline i32x16 splat_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline i32x16 load_i32(const int32_t* p) { return {_mm256_loadu_si256(as_vector(p)), _mm256_loadu_si256(as_vector(p + 8))}; }
inline i32x16 operator+(i32x16 x, i32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline i32x16 operator-(i32x16 x, i32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
template <int n>
inline i32x16 shift_left(i32x16 x) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
template <int n>
inline i32x16 shift_right(i32x16 x) {
  return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)};
}
inline f32x16 to_f32(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline i32x16 to_i32(f32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline f32x16 scale_2(f32x16 x, i32x16 n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), _mm256_slli_epi32(n.a, 23))),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), _mm256_slli_epi32(n.b, 23)))};
}

inline u8x16 load_u8x16(const void* p) { return {_mm_loadu_si128(static_cast<const __m128i*>(p))}; }
inline u8x16 splat_u8(uint8_t x) { return {_mm_set1_epi8(char(x))}; }
inline u8x16 operator&(u8x16 x, u8x16 y) { return {_mm_and_si128(x.v, y.v)}; }
inline u8x16 operator|(u8x16 x, u8x16 y) { return {_mm_or_si128(x.v, y.v)}; }
template <int n>
inline u8x16 shift_right_u8(u8x16 x) {
  return {_mm_and_si128(_mm_srli_epi16(x.v, n), _mm_set1_epi8(char(255 >> n)))};
}
template <int n>
inline u8x16 shift_left_u8(u8x16 x) {
  return {_mm_and_si128(_mm_slli_epi16(x.v, n), _mm_set1_epi8(char(255 << n)))};
}
inline f32x16 widen_u8(u8x16 x) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x.v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x.v, 8)))};
}
inline f32x16 widen_i8(u8x16 x) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x.v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x.v, 8)))};
}

inline bytes64 load_bytes(const void* p) {
  const auto* v = as_vector(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
// Makes x new to the compiler, at no cost.
inline void renew(bytes64& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }
inline void renew(i16x32& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }
inline bytes64 splat_bytes(uint8_t x) { return {_mm256_set1_epi8(char(x)), _mm256_set1_epi8(char(x))}; }
inline bytes64 operator&(bytes64 x, bytes64 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline bytes64 operator|(bytes64 x, bytes64 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int n>
inline bytes64 shift_right_bits(bytes64 x) {
  return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)};
}
template <int n>
inline bytes64 shift_left_bits(bytes64 x) {
  return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)};
}

// The barriers below keep each sum beside its products: GCC else gathers the products, which then do not fit the registers.
inline __m256i dot_8(__m256i acc, __m256i u, __m256i s) {
  __m256i sum = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
  asm volatile("" : "+x"(sum));
  return sum;
}
inline i32x16 dot_u8(i32x16 acc, bytes64 u, bytes64 s) { return {dot_8(acc.a, u.a, s.a), dot_8(acc.b, u.b, s.b)}; }
inline __m256i splat_four(const int8_t* s4) {
  int32_t four;
  __builtin_memcpy(&four, s4, 4);
  return _mm256_set1_epi32(four);
}
inline i32x16 dot_u8(i32x16 acc, bytes64 u, const int8_t* s4) {
  const __m256i s = splat_four(s4);
  return dot_u8(acc, u, {s, s});
}
// Signed codes as |w| · (s with w's sign): a pair of products is at most 2 · 128 · 127, which 16 bits hold.
inline i32x16 dot_code(i32x16 acc, bytes64 u, const int8_t* s4) {
  const __m256i s = splat_four(s4), flip = _mm256_set1_epi8(char(0x80));
  const __m256i wa = _mm256_xor_si256(u.a, flip), wb = _mm256_xor_si256(u.b, flip);
  return {dot_8(acc.a, _mm256_abs_epi8(wa), _mm256_sign_epi8(s, wa)), dot_8(acc.b, _mm256_abs_epi8(wb), _mm256_sign_epi8(s, wb))};
}

inline f32x16 load_f16(const uint16_t* p) {
  const auto* v = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
}
inline __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline f32x16 load_bf16(const uint16_t* p) {
  const auto* v = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(v)), widen_bf16(_mm_loadu_si128(v + 1))};
}
inline f32x16 load_i8(const int8_t* p) { return widen_i8(load_u8x16(p)); }
inline f32x16 load_f16(const uint16_t* p, int n) {
  uint16_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_f16(t);
}
inline f32x16 load_bf16(const uint16_t* p, int n) {
  uint16_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_bf16(t);
}
inline f32x16 load_i8(const int8_t* p, int n) {
  int8_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_i8(t);
}

// Sixteen 32-bit lanes, each below 65536, to 16 bits.
inline __m256i narrow_u32(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }
inline __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
}
inline __m256i narrow_bf16(f32x16 x) { return narrow_u32(round_bf16(x.a), round_bf16(x.b)); }
inline void store_bf16(uint16_t* p, f32x16 x) { _mm256_storeu_si256(as_vector(p), narrow_bf16(x)); }
inline void store_f16(uint16_t* p, f32x16 x) {
  auto* v = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(v, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(v + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_i8(int8_t* p, f32x16 x) {
  const i32x16 n = to_i32(x);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(n.a, n.b), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store_bf16(uint16_t* p, f32x16 x, int n) {
  uint16_t t[16];
  store_bf16(t, x);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
inline void store_f16(uint16_t* p, f32x16 x, int n) {
  uint16_t t[16];
  store_f16(t, x);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
inline void store_i8(int8_t* p, f32x16 x, int n) {
  int8_t t[16];
  store_i8(t, x);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

inline bf16x32 load_bf16x32(const uint16_t* p) { return {_mm256_loadu_si256(as_vector(p)), _mm256_loadu_si256(as_vector(p + 16))}; }
inline void store_bf16x32(uint16_t* p, bf16x32 x) { _mm256_storeu_si256(as_vector(p), x.a), _mm256_storeu_si256(as_vector(p + 16), x.b); }
inline bf16x32 splat_bf16_pair(const uint16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, 4);
  return {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
}
inline bf16x32 to_bf16x32(f32x16 low, f32x16 high) { return {narrow_bf16(low), narrow_bf16(high)}; }
inline f32x16 widen_even(bf16x32 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
inline f32x16 widen_odd(bf16x32 x) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
inline f32x16 dot_bf16(f32x16 acc, bf16x32 a, bf16x32 b) { return fma(widen_odd(a), widen_odd(b), fma(widen_even(a), widen_even(b), acc)); }

inline bf16x32 max_magnitude(bf16x32 x, bf16x32 y) {
  const __m256i size = _mm256_set1_epi16(0x7fff);
  return {_mm256_max_epu16(x.a, _mm256_and_si256(y.a, size)), _mm256_max_epu16(x.b, _mm256_and_si256(y.b, size))};
}

// a[0] b[0] a[1] b[1] …: the first 16 pairs, and the last.
inline bf16x32 interleave(__m256i a, __m256i b) {
  const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}
inline bf16x32 interleave_low(bf16x32 a, bf16x32 b) { return interleave(a.a, b.a); }
inline bf16x32 interleave_high(bf16x32 a, bf16x32 b) { return interleave(a.b, b.b); }
// Elements 2i from `even`, 2i + 1 from `odd`.
inline bf16x32 pair_bf16(f32x16 even, f32x16 odd) { return interleave(narrow_bf16(even), narrow_bf16(odd)); }

inline i16x32 load_i16x32(const int16_t* p) { return {_mm256_loadu_si256(as_vector(p)), _mm256_loadu_si256(as_vector(p + 16))}; }
inline void store_i16x32(int16_t* p, i16x32 x) { _mm256_storeu_si256(as_vector(p), x.a), _mm256_storeu_si256(as_vector(p + 16), x.b); }
inline i16x32 splat_i16_pair(const int16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, 4);
  const __m256i both = _mm256_set1_epi32(two);
  return {both, both};
}
inline i32x16 dot_i16(i32x16 acc, i16x32 a, i16x32 b) {
  __m256i low = _mm256_add_epi32(acc.a, _mm256_madd_epi16(a.a, b.a)), high = _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.b, b.b));
  asm volatile("" : "+x"(low), "+x"(high));
  return {low, high};
}
inline void store_i16(int16_t* p, i32x16 x) {
  _mm256_storeu_si256(as_vector(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
inline __m256i pair_i16(__m256i even, __m256i odd) { return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa); }
inline i16x32 pair_i16(i32x16 even, i32x16 odd) { return {pair_i16(even.a, odd.a), pair_i16(even.b, odd.b)}; }
inline i16x32 interleave_low(i16x32 a, i16x32 b) {
  const bf16x32 x = interleave(a.a, b.a);
  return {x.a, x.b};
}
inline i16x32 interleave_high(i16x32 a, i16x32 b) {
  const bf16x32 x = interleave(a.b, b.b);
  return {x.a, x.b};
}

// Partial sums of a dot product, in one register.
struct f32_dots {
  __m256 v;
};
inline f32_dots zero_dots() { return {_mm256_setzero_ps()}; }
inline f32_dots add_dots(f32_dots acc, f32x16 x, f32x16 y) { return {_mm256_fmadd_ps(x.b, y.b, _mm256_fmadd_ps(x.a, y.a, acc.v))}; }
inline f32_dots add_dots(f32_dots acc, bf16x32 x, bf16x32 y) {
  return add_dots(add_dots(acc, widen_even(x), widen_even(y)), widen_odd(x), widen_odd(y));
}
// Lane 4 q + i is the sum of lanes 4 q … 4 q + 3 of x_i.
inline f32x16 sum_quads(f32_dots x0, f32_dots x1, f32_dots x2, f32_dots x3) {
  return {_mm256_hadd_ps(_mm256_hadd_ps(x0.v, x1.v), _mm256_hadd_ps(x2.v, x3.v)), _mm256_setzero_ps()};
}
// Lane 4 k + i is the sum over q of lanes 4 q + i of x_k.
inline f32x16 sum_quarters(f32x16 x0, f32x16 x1, f32x16 x2, f32x16 x3) {
  auto halves = [](f32x16 x, f32x16 y) {
    const __m256 s = _mm256_add_ps(x.a, x.b), t = _mm256_add_ps(y.a, y.b);
    return _mm256_add_ps(_mm256_permute2f128_ps(s, t, 0x20), _mm256_permute2f128_ps(s, t, 0x31));
  };
  return {halves(x0, x1), halves(x2, x3)};
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
