// Which cache rows a query sees, and how its result joins one that is there.
#pragma once

#include "cuda/attention.h"
#include "cuda/launch.cuh"

namespace mla::cuda {

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

}  // namespace mla::cuda
