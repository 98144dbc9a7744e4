// How weights lie in the GPU's memory. A matrix keeps its rows one after the other, padded with zeros to 16 rows and to whole units of
// columns. f32 and bf16 stay as they are and f16 becomes bf16. Quantised rows are [codes of all rows | scales], the codes in the order in
// which four lanes of a warp multiply them (product_gemv.cuh). q8_0 and q4_0 keep the file's numbers, with an f16 scale for each 32 columns
// of a row; the other quantised types become q8_0, which rounds them by at most 1/254 of their block's largest. fp8 keeps the file's
// numbers, too: codes in the order of q8_0, and an f32 scale for each 128 rows × 128 columns.
#pragma once

#include "cuda/error.h"
#include "cuda/sizes.h"
#include "device/device.h"

namespace mla::cuda {

constexpr int unit_columns(DType held) { return held == DType::q4_0 ? 128 : held == DType::f32 ? 4 : 64; }

struct PackedMatrix {
  const std::byte* data;
  int64_t matrix_bytes;
  int rows, cols, pitch;  // pitch: columns with the padding
  DType type;             // f32, bf16, f8, q8_0 or q4_0

  __host__ __device__ int padded_rows() const { return (rows + 15) / 16 * 16; }
  __host__ __device__ int64_t code_row_bytes() const {
    return type == DType::f32 ? int64_t(pitch) * 4 : type == DType::bf16 ? int64_t(pitch) * 2 : type == DType::q4_0 ? pitch / 2 : pitch;
  }
  __host__ __device__ const std::byte* codes(int64_t matrix, int64_t row) const {
    return data + matrix * matrix_bytes + row * code_row_bytes();
  }
  // A row's scales; of fp8, those of its 128 rows.
  __host__ __device__ const std::byte* scales(int64_t matrix, int64_t row) const {
    return data + matrix * matrix_bytes + padded_rows() * code_row_bytes() +
           (type == DType::f8 ? row / 128 * ((cols + 127) / 128) * 4 : row * (pitch / 32 * 2));
  }
  __host__ __device__ int64_t bytes() const {
    const int64_t codes = padded_rows() * code_row_bytes();
    if (type == DType::f8) return codes + int64_t(rows + 127) / 128 * ((cols + 127) / 128) * 4;
    return type == DType::q8_0 || type == DType::q4_0 ? codes + padded_rows() * (pitch / 32 * 2) : codes;
  }
};

inline PackedMatrix packed(DType held, int64_t rows, int64_t cols) {
  PackedMatrix m{nullptr, 0, int(rows), int(cols), int(round_up(cols, unit_columns(held))), held};
  m.matrix_bytes = round_up(m.bytes(), 256);
  return m;
}

inline PackedMatrix packed(const Weight& w) {
  PackedMatrix m = packed(w.dtype, w.rows, w.cols);
  m.data = w.data;
  return m;
}

}  // namespace mla::cuda
