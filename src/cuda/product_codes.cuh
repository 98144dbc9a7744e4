// Codes of weights on their way to the matrix units: what a thread has of 64 columns of two rows, 8 apart, becomes the instruction's
// fragments in bf16, as near to scale × code as bf16 is. A step has 64 bytes of each of 128 rows of codes, and their scales.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pack.h"
#include "cuda/ptx.cuh"

namespace mla::cuda {

template <DType Type>
struct Codes {
  static constexpr int columns = 64, scale_bytes = 0;
};

// A scale as two bf16, so that their products with what bf16 holds exactly round once.
struct SplitScale {
  __nv_bfloat162 high, low;
  __device__ explicit SplitScale(float scale)
      : high(__float2bfloat162_rn(scale)), low(__float2bfloat162_rn(scale - __bfloat162float(high.x))) {}
  __device__ uint32_t times(__nv_bfloat162 codes) const { return as_word(__hfma2(codes, high, __hmul2(codes, low))); }
};

// A thread's 16 bytes of a row become 8 pairs of columns; pair 2 s + h is half h of the fragment of step s. `upper` and `lower` rows take
// turns in a fragment.
template <class Pairs>
__device__ inline void fill_fragments(uint32_t (&a)[16], Pairs upper, Pairs lower) {
#pragma unroll
  for (int i = 0; i < 8; ++i) a[2 * i] = upper(i), a[2 * i + 1] = lower(i);
}

__device__ inline uint4 code_row(const uint8_t* codes, int row, int t) {
  return *reinterpret_cast<const uint4*>(codes + row * 64 + t * 16);
}

// Codes whose rows have scales of their own, in f16, each for 32 columns; a row has so many bytes of them a step.
template <int Bytes>
struct ScaledRows {
  static constexpr int row_scale_bytes = Bytes, scale_bytes = 128 * Bytes;
  __device__ static void copy_scales(const PackedMatrix& w, int matrix, int row, int column, int lane, uint8_t* to) {
#pragma unroll 1
    for (int r = lane; r < 128; r += 32)
      copy_small<Bytes>(to + r * Bytes, w.scales(matrix, min(row + r, w.padded_rows() - 1)) + column / 16);
  }
};

template <>
struct Codes<DType::q8_0> : ScaledRows<4> {
  static constexpr int columns = 64;
  __device__ static void expand(const uint8_t* codes, const uint8_t* scales, int row, int t, int, uint32_t (&a)[16]) {
    struct Row {
      uint32_t word[4];
      float scale[2];
      __device__ Row(const uint4& c, uint32_t halves)
          : word{c.x ^ 0x80808080, c.y ^ 0x80808080, c.z ^ 0x80808080, c.w ^ 0x80808080}, scale{half_of(halves, 0), half_of(halves, 1)} {}
      // A byte becomes the low bits of 2^23 + byte in f32; less 2^23 + 128, that is the code.
      __device__ float value(int i) const {
        return (__uint_as_float(__byte_perm(word[i / 4], 0x4b000000, 0x7440 + i % 4)) - 8388736.0f) * scale[i / 8];
      }
      __device__ uint32_t operator()(int i) const { return bf16_pair(value(2 * i), value(2 * i + 1)); }
    };
    const auto* s = reinterpret_cast<const uint32_t*>(scales);
    fill_fragments(a, Row(code_row(codes, row, t), s[row]), Row(code_row(codes, row + 8, t), s[row + 8]));
  }
};

template <>
struct Codes<DType::q4_0> : ScaledRows<8> {
  static constexpr int columns = 128;
  // `half`: the first or second 64 columns.
  __device__ static void expand(const uint8_t* codes, const uint8_t* scales, int row, int t, int half, uint32_t (&a)[16]) {
    struct Row {
      uint32_t word[2];
      SplitScale scale[2];
      __device__ Row(const uint2& c, uint32_t halves)
          : word{c.x, c.y}, scale{SplitScale(half_of(halves, 0)), SplitScale(half_of(halves, 1))} {}
      __device__ uint32_t operator()(int i) const { return scale[i / 4].times(nibble_pair(word[i / 4], i % 4)); }
    };
    auto of = [&](int r) {
      return Row(*reinterpret_cast<const uint2*>(codes + r * 64 + t * 16 + half * 8),
                 *reinterpret_cast<const uint32_t*>(scales + r * row_scale_bytes + half * 4));
    };
    fill_fragments(a, of(row), of(row + 8));
  }
};

template <>
struct Codes<DType::f8> {
  static constexpr int columns = 64, scale_bytes = 16;  // one scale for 128 rows × 128 columns
  __device__ static void copy_scales(const PackedMatrix& w, int matrix, int row, int column, int lane, uint8_t* to) {
    if (lane == 0) copy_small<4>(to, w.scales(matrix, row) + column / 128 * 4);
  }
  __device__ static void expand(const uint8_t* codes, const uint8_t* scales, int row, int t, int, uint32_t (&a)[16]) {
    struct Row {
      uint32_t word[4];
      SplitScale scale;
      __device__ Row(const uint4& c, const SplitScale& s) : word{c.x, c.y, c.z, c.w}, scale(s) {}
      __device__ uint32_t operator()(int i) const {
        const uint32_t pair = f8_pair(word[i / 2], i % 2);
        return scale.times(*reinterpret_cast<const __nv_bfloat162*>(&pair));
      }
    };
    const SplitScale scale(*reinterpret_cast<const float*>(scales));
    fill_fragments(a, Row(code_row(codes, row, t), scale), Row(code_row(codes, row + 8, t), scale));
  }
};

}  // namespace mla::cuda
