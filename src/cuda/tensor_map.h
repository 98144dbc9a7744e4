// The copy engine's view of a cache.
#pragma once

#include "device/attention.h"

#include <cuda.h>

namespace mla::cuda {

// bf16 [pages, page_tokens, columns], read in boxes of 64 tokens × 64 columns with 128-byte rows swizzled; columns past the row read as 0.
CUtensorMap cache_map(const Kv& kv);
// bf16 [rows, columns], read in boxes of 16 rows × 64 columns in the same order.
CUtensorMap query_map(const void* q, int64_t rows, int columns);

}  // namespace mla::cuda
