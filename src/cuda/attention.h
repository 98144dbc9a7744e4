// Attention beside absorbed decode (decode.h): any layout, any type of cache.
#pragma once

#include "cuda/cache_rows.cuh"
#include "cuda/step.h"

namespace mla::cuda {

struct AttentionCall {
  int64_t n;
  const float* q;  // [n, n_h, d_k]; strides in elements
  int64_t q_row, q_head;
  const std::byte* base;
  int64_t page_bytes;
  int page_tokens;
  RowFormat format;
  SpanTable spans;  // its list is null for a single span, `one`, whose rows may be in a single page, `page`
  GpuSpan one;
  int32_t page;
  int most_seen;        // rows of the cache that a span has at most, or more
  int n_h, processors;  // multiprocessors of the GPU
  bool causal;
  int window;
  float scale;
  float* o;  // [n, n_h, d_v]
  int64_t o_row, o_head;
  float* lse;  // [n, n_h]
  int64_t lse_row, lse_head;
  int64_t split_o, split_lse;  // between results of splits of the context
  bool merge;
  unsigned* taken;  // pieces of work, a counter that is 0 between kernels
};

// By plain instructions: a block for each query and head.
void attend_portable(const AttentionCall& call, cudaStream_t stream);

// By Hopper's matrix units, for bf16 caches of separate keys and values in some widths of heads; queries and results begin at multiples of
// 16 bytes, by row and head, too. Few queries with long contexts leave partial results in `scratch`.
bool attend_tiles_takes(const AttentionCall& call);
size_t attend_tiles_scratch_bytes(const AttentionCall& call);
void attend_tiles(const AttentionCall& call, void* scratch, cudaStream_t stream);

}  // namespace mla::cuda
