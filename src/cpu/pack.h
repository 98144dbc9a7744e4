// How weights lie in memory. Sixteen output rows are interleaved, so that one vector holds the same columns of sixteen rows and a
// product needs no horizontal sums. Along the columns a group is a row of units; a unit keeps the bytes of the file's blocks, only
// transposed: element e of a field of row r is at to + step · block + (16 e + r) · width. Nothing grows but padding.
#pragma once

#include "core/dtype.h"

namespace mla {

// A field of a block in the file, as elements of 1, 2 or 4 bytes.
struct PackedField {
  int from, count, width;
  int to, step;
  uint8_t flip;  // exclusive-or on each byte
};

struct PackedFormat {
  int unit_cols, unit_bytes;    // of a group of sixteen rows
  int block_cols, block_bytes;  // in the file
  int fields;
  PackedField field[5];
};

constexpr PackedFormat packed_format(DType type) {
  switch (type) {
    case DType::f32: return {32, 2048, 32, 128, 1, {{0, 32, 4, 0, 0, 0}}};
    case DType::f16: return {32, 1024, 32, 64, 1, {{0, 32, 2, 0, 0, 0}}};
    case DType::bf16: return {32, 1024, 32, 64, 1, {{0, 16, 4, 0, 0, 0}}};  // pairs of columns, as bf16 dots take them
    case DType::q4_0: return {64, 576, 32, 18, 2, {{0, 1, 2, 0, 32, 0}, {2, 4, 4, 64, 256, 0}}};
    case DType::q4_1: return {64, 640, 32, 20, 3, {{0, 1, 2, 0, 32, 0}, {2, 1, 2, 64, 32, 0}, {4, 4, 4, 128, 256, 0}}};
    case DType::q8_0: return {64, 1088, 32, 34, 2, {{0, 1, 2, 0, 32, 0}, {2, 8, 4, 64, 512, 0x80}}};  // code + 128
    case DType::q4_k:
      return {256, 2304, 256, 144, 4, {{0, 1, 2, 0, 0, 0}, {2, 1, 2, 32, 0, 0}, {4, 12, 1, 64, 0, 0}, {16, 32, 4, 256, 0, 0}}};
    case DType::q5_k:
      return {256, 2816, 256,
              176, 5,    {{0, 1, 2, 0, 0, 0}, {2, 1, 2, 32, 0, 0}, {4, 12, 1, 64, 0, 0}, {16, 8, 4, 256, 0, 0}, {48, 32, 4, 768, 0, 0}}};
    case DType::q6_k:
      return {256, 3360, 256, 210, 4, {{0, 32, 4, 0, 0, 0}, {128, 16, 4, 2048, 0, 0}, {192, 16, 1, 3072, 0, 0}, {208, 1, 2, 3328, 0, 0}}};
    default: return {};
  }
}

constexpr int64_t packed_units(DType type, int64_t cols) {
  return (cols + packed_format(type).unit_cols - 1) / packed_format(type).unit_cols;
}
constexpr int64_t packed_groups(int64_t rows) { return (rows + 15) / 16; }
constexpr int64_t packed_group_bytes(DType type, int64_t cols) { return packed_units(type, cols) * packed_format(type).unit_bytes; }

}  // namespace mla
