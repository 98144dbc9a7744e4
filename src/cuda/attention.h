// Attention beside absorbed decode (decode.h): any layout, any type of cache.
#pragma once

#include "cuda/cache_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/step.h"

namespace mla::cuda {

struct AttentionCall {
  const float* q;  // [n, n_h, d_k]; strides in elements
  int64_t q_row, q_head;
  const std::byte* base;
  int64_t page_bytes;
  int page_tokens;
  RowFormat format;
  SpanTable spans;  // its list is null for a single span, `one`, whose rows may be in a single page, `page`
  GpuSpan one;
  int32_t page;
  int n_h;
  bool causal;
  int window;
  float scale;
  float* o;  // [n, n_h, d_v]
  int64_t o_row, o_head;
  float* lse;  // [n, n_h]
  int64_t lse_row, lse_head;
  bool merge;
};

__device__ inline GpuSpan span_of(const AttentionCall& c, int index) { return c.spans.spans ? c.spans.spans[index] : c.one; }
__device__ inline int32_t page_of(const AttentionCall& c, const GpuSpan& s, int index) {
  return c.spans.pages ? c.spans.pages[s.table + index] : c.page;
}

// Rows [begin, end) of a span that a query at `position` sees.
__device__ inline int first_seen(const AttentionCall& c, const GpuSpan& s, int position) {
  return c.window > 0 ? max(0, position - c.window + 1 - s.kv_position) : 0;
}
__device__ inline int end_seen(const AttentionCall& c, const GpuSpan& s, int position) {
  return c.causal ? max(0, min(s.kv_count, position - s.kv_position + 1)) : s.kv_count;
}

// What a row's own result and the one that is there are multiplied by, for their lse (natural, -inf for none); `lse` becomes the sum's.
__device__ inline void merge_weights(float& lse, float before, float& own, float& other) {
  const float top = fmaxf(lse, before);
  if (top == -INFINITY) {
    own = other = 0, lse = -INFINITY;
    return;
  }
  own = expf(lse - top), other = expf(before - top);
  const float sum = own + other;
  own /= sum, other /= sum, lse = top + logf(sum);
}

// By plain instructions: a block for each query and head.
void attend_portable(const AttentionCall& call, cudaStream_t stream);

// By tensor cores, for bf16 caches of separate keys and values in some widths of heads.
bool attend_tiles_takes(const KvFormat& format);
void attend_tiles(const AttentionCall& call, cudaStream_t stream);

}  // namespace mla::cuda
