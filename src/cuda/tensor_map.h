// Tensor maps: what the copy engine is told of arrays in the GPU's memory. Boxes of bf16 have 64 columns, swizzled in rows of 128 bytes.
#pragma once

#include "device/attention.h"

#include <cuda.h>

namespace mla::cuda {

// Pages of rows, [page, token, column], in boxes of `box_rows`; distances in bytes.
CUtensorMap pages_map(const void* base, int64_t columns, int page_tokens, int64_t row_bytes, int64_t page_bytes, int box_rows);
// The pages of a bf16 cache of latents, in boxes of 64 tokens.
CUtensorMap cache_map(const Kv& kv);
// Queries, [row, column], in boxes of `box_rows`. What lies outside reads as zeros.
CUtensorMap query_map(const void* q, int64_t rows, int columns, int box_rows);
// A stack of matrices, [matrix, row, column], in boxes of `box_rows`; distances in bytes. What lies outside reads as zeros.
CUtensorMap matrix_map(const void* base, int64_t columns, int64_t rows, int64_t matrices, int64_t row_bytes, int64_t matrix_bytes,
                       int box_rows);
// The same of bytes, in boxes of 64 that are not swizzled.
CUtensorMap codes_map(const void* base, int64_t row_bytes, int64_t rows, int64_t matrices, int64_t matrix_bytes, int box_rows);

}  // namespace mla::cuda
