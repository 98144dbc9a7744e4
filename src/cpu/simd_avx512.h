// simd.h for AVX-512 (F, BW, VL, DQ and VNNI; BF16 where the leaf is compiled with it).
#pragma once

#include <immintrin.h>

namespace mla {
namespace {

struct f32x16 {
  __m512 v;
};
struct i32x16 {
  __m512i v;
};
struct u8x16 {
  __m128i v;
};
struct bytes64 {
  __m512i v;
};
struct bf16x32 {
  __m512i v;
};
struct i16x32 {
  __m512i v;
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // processors with tiles run dots of bf16 vectors at half the rate of f32
constexpr bool isa_has_bf16 = true;
#else
constexpr bool isa_has_bf16 = false;
#endif
constexpr bool isa_has_i16 = !isa_has_bf16;
constexpr int code_bias = 128;  // dot_code multiplies the stored code as it is; callers take 128 · Σ s off
constexpr int vector_registers = 32;
constexpr int dot_chains = 16;

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

inline f32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline f32x16 zero_f32() { return {_mm512_setzero_ps()}; }
inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f32x16 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, f32x16 x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline f32x16 sqrt(f32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline float sum(f32x16 a) { return _mm512_reduce_add_ps(a.v); }
inline float top(f32x16 a) { return _mm512_reduce_max_ps(a.v); }
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

inline i32x16 splat_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline i32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int n>
inline i32x16 shift_left(i32x16 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
inline i32x16 shift_right(i32x16 a) {
  return {_mm512_srai_epi32(a.v, n)};
}
inline f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 to_i32(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline f32x16 scale_2(f32x16 x, i32x16 n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(n.v, 23)))};
}

inline u8x16 load_u8x16(const void* p) { return {_mm_loadu_si128(static_cast<const __m128i*>(p))}; }
inline u8x16 splat_u8(uint8_t x) { return {_mm_set1_epi8(char(x))}; }
inline u8x16 operator&(u8x16 a, u8x16 b) { return {_mm_and_si128(a.v, b.v)}; }
inline u8x16 operator|(u8x16 a, u8x16 b) { return {_mm_or_si128(a.v, b.v)}; }
template <int n>
inline u8x16 shift_right_u8(u8x16 a) {
  return {_mm_and_si128(_mm_srli_epi16(a.v, n), _mm_set1_epi8(char(255 >> n)))};
}
template <int n>
inline u8x16 shift_left_u8(u8x16 a) {
  return {_mm_and_si128(_mm_slli_epi16(a.v, n), _mm_set1_epi8(char(255 << n)))};
}
inline f32x16 widen_u8(u8x16 a) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(a.v))}; }
inline f32x16 widen_i8(u8x16 a) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a.v))}; }

inline bytes64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
// Makes x new to the compiler, at no cost.
inline void renew(bytes64& x) { asm volatile("" : "+v"(x.v)); }
inline void renew(i16x32& x) { asm volatile("" : "+v"(x.v)); }
inline bytes64 splat_bytes(uint8_t x) { return {_mm512_set1_epi8(char(x))}; }
inline bytes64 operator&(bytes64 a, bytes64 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline bytes64 operator|(bytes64 a, bytes64 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n>
inline bytes64 shift_right_bits(bytes64 a) {
  return {_mm512_srli_epi16(a.v, n)};
}
template <int n>
inline bytes64 shift_left_bits(bytes64 a) {
  return {_mm512_slli_epi16(a.v, n)};
}

// Dots of loops are written as assembly: GCC 12 copies the sums of the intrinsics to other registers and back, and spills some.
inline i32x16 dot_u8(i32x16 acc, bytes64 u, bytes64 s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
  return acc;
}
inline i32x16 dot_u8(i32x16 acc, bytes64 u, const int8_t* s4) {
  int32_t four;
  __builtin_memcpy(&four, s4, 4);
  return {_mm512_dpbusd_epi32(acc.v, u.v, _mm512_set1_epi32(four))};
}
inline i32x16 dot_code(i32x16 acc, bytes64 u, const int8_t* s4) { return dot_u8(acc, u, s4); }

inline f32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline f32x16 load_f16(const uint16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline f32x16 widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline f32x16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline f32x16 load_bf16(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline f32x16 load_i8(const int8_t* p) { return widen_i8(load_u8x16(p)); }
inline f32x16 load_i8(const int8_t* p, int n) { return widen_i8({_mm_maskz_loadu_epi8(first(n), p)}); }

inline __m256i narrow_bf16(f32x16 x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline void store_bf16(uint16_t* p, f32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
inline void store_bf16(uint16_t* p, f32x16 x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(x)); }
inline __m256i narrow_f16(f32x16 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
inline void store_f16(uint16_t* p, f32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
inline void store_f16(uint16_t* p, f32x16 x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(x)); }
inline void store_i8(int8_t* p, f32x16 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(to_i32(x).v)); }
inline void store_i8(int8_t* p, f32x16 x, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(to_i32(x).v)); }

inline bf16x32 load_bf16x32(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bf16x32(uint16_t* p, bf16x32 x) { _mm512_storeu_si512(p, x.v); }
inline bf16x32 splat_bf16_pair(const uint16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, 4);
  return {_mm512_set1_epi32(two)};
}
// Lanes 0…15 are `low`, 16…31 are `high`.
inline bf16x32 to_bf16x32(f32x16 low, f32x16 high) {
  return {_mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(low)), narrow_bf16(high), 1)};
}
inline f32x16 widen_even(bf16x32 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
inline f32x16 widen_odd(bf16x32 x) { return {_mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(int(0xffff0000))))}; }
inline f32x16 dot_bf16(f32x16 acc, bf16x32 a, bf16x32 b) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
#else
  return fma(widen_odd(a), widen_odd(b), fma(widen_even(a), widen_even(b), acc));
#endif
}

inline bf16x32 max_magnitude(bf16x32 x, bf16x32 y) { return {_mm512_max_epu16(x.v, _mm512_and_si512(y.v, _mm512_set1_epi16(0x7fff)))}; }

// a[0] b[0] a[1] b[1] …: the first 16 pairs, and the last.
inline bf16x32 interleave_low(bf16x32 a, bf16x32 b) {
  alignas(64) static constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return {_mm512_permutex2var_epi16(a.v, _mm512_load_si512(order), b.v)};
}
inline bf16x32 interleave_high(bf16x32 a, bf16x32 b) {
  alignas(64) static constexpr uint16_t order[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return {_mm512_permutex2var_epi16(a.v, _mm512_load_si512(order), b.v)};
}
// Elements 2i from `even`, 2i + 1 from `odd`.
inline bf16x32 pair_bf16(f32x16 even, f32x16 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(narrow_bf16(even)), high = _mm512_cvtepu16_epi32(narrow_bf16(odd));
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}

inline i16x32 load_i16x32(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i16x32(int16_t* p, i16x32 x) { _mm512_storeu_si512(p, x.v); }
inline i16x32 splat_i16_pair(const int16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, 4);
  return {_mm512_set1_epi32(two)};
}
inline i32x16 dot_i16(i32x16 acc, i16x32 a, i16x32 b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}
inline void store_i16(int16_t* p, i32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v)); }
inline i16x32 pair_i16(i32x16 even, i32x16 odd) { return {_mm512_mask_blend_epi16(0xaaaaaaaa, even.v, _mm512_slli_epi32(odd.v, 16))}; }
inline i16x32 interleave_low(i16x32 a, i16x32 b) { return {interleave_low(bf16x32{a.v}, bf16x32{b.v}).v}; }
inline i16x32 interleave_high(i16x32 a, i16x32 b) { return {interleave_high(bf16x32{a.v}, bf16x32{b.v}).v}; }

// Partial sums of a dot product.
using f32_dots = f32x16;
inline f32_dots zero_dots() { return zero_f32(); }
inline f32_dots add_dots(f32_dots acc, f32x16 x, f32x16 y) { return fma(x, y, acc); }
inline f32_dots add_dots(f32_dots acc, bf16x32 x, bf16x32 y) { return dot_bf16(acc, x, y); }
// Lane 4 q + i is the sum of lanes 4 q … 4 q + 3 of x_i; the sums of all four lie in that order after sum_quarters.
inline f32x16 sum_quads(f32x16 x0, f32x16 x1, f32x16 x2, f32x16 x3) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x0.v, x1.v), _mm512_unpackhi_ps(x0.v, x1.v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x2.v, x3.v), _mm512_unpackhi_ps(x2.v, x3.v));
  return {_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee))};
}
// Lane 4 k + i is the sum over q of lanes 4 q + i of x_k.
inline f32x16 sum_quarters(f32x16 x0, f32x16 x1, f32x16 x2, f32x16 x3) {
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(x0.v, x1.v, 0x88), _mm512_shuffle_f32x4(x0.v, x1.v, 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(x2.v, x3.v, 0x88), _mm512_shuffle_f32x4(x2.v, x3.v, 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
}

inline void transpose(f32x16 (&x)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v), t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // u[4 g + k] holds columns k, k + 4, k + 8, k + 12 of rows 4 g … 4 g + 3, one 128-bit part each.
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(u[k], u[4 + k], 0x88), b = _mm512_shuffle_f32x4(u[k], u[4 + k], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0x88), d = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0xdd);
    x[k].v = _mm512_shuffle_f32x4(a, c, 0x88), x[8 + k].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[4 + k].v = _mm512_shuffle_f32x4(b, d, 0x88), x[12 + k].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace
}  // namespace mla
