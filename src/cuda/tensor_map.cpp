// Encodes tensor maps through the driver's entry point, so that nothing links the driver.
#include "cuda/tensor_map.h"

#include "core/check.h"
#include "cuda/error.h"

#include <cudaTypedefs.h>

#include <array>

namespace mla::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) fail_input("the NVIDIA driver is too old for this GPU code; install one for CUDA 12 or later");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
}

CUtensorMap encode(const void* base, std::array<cuuint64_t, 3> size, std::array<cuuint64_t, 2> stride, cuuint32_t box_rows,
                   CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  static const PFN_cuTensorMapEncodeTiled_v12000 driver = encoder();
  const cuuint32_t box[] = {64, box_rows, 1}, step[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      driver(&map, type, 3, const_cast<void*>(base), size.data(), stride.data(), box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled gave {} for rows of {} bytes, pages of {}", int(result), stride[0], stride[1]);
  return map;
}

}  // namespace

CUtensorMap pages_map(const void* base, int64_t columns, int page_tokens, int64_t row_bytes, int64_t page_bytes, int box_rows) {
  // The number of pages bounds nothing here: page numbers come from the cache itself.
  return encode(base, {cuuint64_t(columns), cuuint64_t(page_tokens), cuuint64_t(1) << 31}, {cuuint64_t(row_bytes), cuuint64_t(page_bytes)},
                cuuint32_t(box_rows));
}

CUtensorMap cache_map(const Kv& kv) {
  return pages_map(kv.base, kv.format.layout.d_k, kv.page_tokens, kv.format.row_bytes(), kv.page_bytes, 64);
}

CUtensorMap matrix_map(const void* base, int64_t columns, int64_t rows, int64_t matrices, int64_t row_bytes, int64_t matrix_bytes,
                       int box_rows) {
  return encode(base, {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(matrices)}, {cuuint64_t(row_bytes), cuuint64_t(matrix_bytes)},
                cuuint32_t(box_rows));
}

CUtensorMap query_map(const void* q, int64_t rows, int columns, int box_rows) {
  return matrix_map(q, columns, rows, 1, columns * 2, columns * 2 * rows, box_rows);
}

CUtensorMap codes_map(const void* base, int64_t row_bytes, int64_t rows, int64_t matrices, int64_t matrix_bytes, int box_rows) {
  return encode(base, {cuuint64_t(row_bytes), cuuint64_t(rows), cuuint64_t(matrices)}, {cuuint64_t(row_bytes), cuuint64_t(matrix_bytes)},
                cuuint32_t(box_rows), CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace mla::cuda
