// NumPy's .npy files: token ids and matrices in, logits out.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

namespace mla {

// A one-dimensional integer array (i4, i8, u2, u4; little endian, C order). Raises Error for anything else or out of i32's range.
std::vector<int32_t> read_npy_ids(const std::filesystem::path& path);

// Numbers in rows, whatever their stored precision.
struct NpyMatrix {
  int64_t rows, cols;
  std::vector<double> values;  // row by row
};
// A two-dimensional array of floating-point numbers (f2, f4, f8; little endian, C or Fortran order). Raises Error for anything else.
NpyMatrix read_npy_matrix(const std::filesystem::path& path);

// f32 [rows, cols], written to a temporary name and renamed.
void write_npy(const std::filesystem::path& path, std::span<const float> values, int64_t rows, int64_t cols);
void write_npy_ids(const std::filesystem::path& path, std::span<const int32_t> ids);

}  // namespace mla
