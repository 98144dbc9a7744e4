// Attention: which kernel runs, and the portable one.
#include "cuda/attention_rows.cuh"
#include "cuda/cuda.h"
#include "cuda/product.h"

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int threads = 128, tile = 64, most_columns = 8;  // columns of the output a thread owns
constexpr int most_context = 1 << 20;

__global__ void __launch_bounds__(threads) portable_kernel(const __grid_constant__ AttentionCall c) {
  begin_kernel();
  __shared__ float score[tile];
  extern __shared__ float q[];  // [d_k]
  const GpuSpan span = span_of(c, int(blockIdx.z));
  const int query = int(blockIdx.x), head = int(blockIdx.y), thread = int(threadIdx.x), lane = thread % 32;
  if (query >= span.count) return;
  const RowFormat& f = c.format;
  const int group = c.n_h / f.heads, kv_head = head / group, position = span.position + query;
  const int key = kv_head * f.d_k, value = f.v_in_k ? key : f.heads * f.d_k + kv_head * f.d_v;
  const int64_t token = span.start + query;
  for (int i = thread; i < f.d_k; i += threads) q[i] = c.q[token * c.q_row + head * c.q_head + i] * c.scale;
  __syncthreads();
  auto row_at = [&](int j) {
    return c.base + int64_t(page_of(c, span, j / c.page_tokens)) * c.page_bytes + int64_t(j % c.page_tokens) * f.row_bytes;
  };
  const int begin = first_seen(c, span, position), end = end_seen(c, span, position);
  float o[most_columns] = {}, m = -INFINITY, l = 0;
  for (int first = begin; first < end; first += tile) {
    const int n = min(tile, end - first);
    for (int j = thread / 32; j < n; j += threads / 32) {
      const std::byte* row = row_at(first + j);
      float sum = 0;
      for (int i = lane; i < f.d_k; i += 32) sum += q[i] * read_element(f, row, key + i);
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) score[j] = sum;
    }
    __syncthreads();
    float next = m;
    for (int j = 0; j < n; ++j) next = fmaxf(next, score[j]);
    const float factor = m == next ? 1 : expf(m - next);
    m = next, l *= factor;
    for (float& x : o) x *= factor;
    for (int j = 0; j < n; ++j) {
      const float p = expf(score[j] - m);
      const std::byte* row = row_at(first + j);
      l += p;
#pragma unroll
      for (int k = 0; k < most_columns; ++k)
        if (thread + k * threads < f.d_v) o[k] += p * read_element(f, row, value + thread + k * threads);
    }
    __syncthreads();
  }
  float *to = c.o + token * c.o_row + head * c.o_head, *sum = c.lse + token * c.lse_row + head * c.lse_head;
  float lse = l > 0 ? m + logf(l) : -INFINITY, own = 1, other = 0;
  if (c.merge) merge_weights(lse, *sum, own, other);
#pragma unroll
  for (int k = 0; k < most_columns; ++k) {
    const int column = thread + k * threads;
    if (column >= f.d_v) break;
    const float y = l > 0 ? o[k] / l : 0;
    to[column] = c.merge ? own * y + (other > 0 ? other * to[column] : 0) : y;
  }
  __syncthreads();
  if (thread == 0) *sum = lse;
}

void check_shapes(const Tensor& q, const Kv& kv, Spans spans, const Tensor& o, const Tensor& lse) {
  const KvLayout& l = kv.format.layout;
  require(
      q.rank == 3 && q.shape[2] == l.d_k && q.stride[2] == 1 && l.heads > 0 && q.shape[1] % l.heads == 0 && (!l.v_in_k || l.d_v <= l.d_k),
      "attention of these queries", q);
  require(o.rank == 3 && o.dtype == DType::f32 && o.shape[0] == q.shape[0] && o.shape[1] == q.shape[1] && o.shape[2] == l.d_v &&
              o.stride[2] == 1,
          "attention into this output", o, q);
  require(lse.rank == 2 && lse.dtype == DType::f32 && lse.shape[0] == q.shape[0] && lse.shape[1] == q.shape[1], "attention into these sums",
          lse, q);
  for (const Span& s : spans)
    require(s.start >= 0 && s.count >= 0 && s.start + int64_t(s.count) <= q.shape[0] && s.kv_count >= 0 && (s.kv_count == 0 || s.pages),
            "attention of spans outside the batch", q);
}

}  // namespace

void attend_portable(const AttentionCall& c, cudaStream_t stream) {
  require(c.format.d_v <= threads * most_columns, "attention with values this wide");
  launch(portable_kernel, dim3(unsigned(c.spans.most_queries), unsigned(c.n_h), unsigned(c.spans.count)), threads, size_t(c.format.d_k) * 4,
         stream, c);
}

void CudaDevice::attend_decode(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse) {
  const int n = int(q.shape[0]), n_h = int(q.shape[1]), d_k = int(q.shape[2]);
  const DecodeRecipe recipe{mask.causal, n_h, kv.page_tokens};
  // The plan of the step if it has been made, else one that serves the other layers of this step, too.
  const DeviceDecodePlan* plan = inputs_.plan();
  if (!inputs_.active()) plans_.clear();  // spans of no step may be others at the same addresses
  if (!plan || !inputs_.holds(spans) || graphs_.recipe(key_) != recipe) {
    plan = nullptr;
    require(!graphs_.recording(), "another plan in a step that repeats");
    if (key_ && inputs_.holds(spans)) graphs_.note(key_, recipe);
    for (const MadePlan& made : plans_)
      if (made.recipe == recipe && same_spans(made.spans, spans)) plan = &made.plan.view();
    if (!plan) {
      const DecodePlan made = plan_decode(spans, mask.causal, n_h, kv.page_tokens, properties_.multiProcessorCount);
      plans_.push_back({{spans.begin(), spans.end()}, recipe, UploadedPlan(made, stream_)});
      plan = &plans_.back().plan.view();
    }
  }
  const void* narrow = q.data;
  if (q.dtype == DType::f32) {
    void* to = scratch_.bytes(size_t(n) * size_t(n_h) * size_t(d_k) * 2);
    rows_to_bf16({q.data, false, q.stride[1], 0, nullptr}, n * n_h, 1, d_k, d_k, to, stream_);
    narrow = to;
  }
  void* partials = scratch_.bytes(decode_scratch_bytes(plan->slots, plan->most_rows, kv.format.layout.d_v));
  decode_sm90({narrow, n, kv, *plan, n_h, scale, true, o.data, lse.f32(), partials}, stream_);
}

void CudaDevice::attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) {
  check_shapes(q, kv, spans, o, lse);
  if (spans.empty() || q.shape[0] == 0) return;
  ArenaScope scope(scratch_);
  const bool whole = q.contiguous() && o.contiguous() && lse.contiguous() && q.shape[2] % 8 == 0;
  if (whole && how == Attend::replace && mask.window == 0 && decode_sm90_takes(kv)) return attend_decode(q, kv, spans, mask, scale, o, lse);

  require(q.dtype == DType::f32, "attention of queries of this type", q);
  AttentionCall c{};
  c.n = q.shape[0], c.q = q.f32(), c.q_row = q.stride[0], c.q_head = q.stride[1], c.n_h = int(q.shape[1]),
  c.processors = properties_.multiProcessorCount;
  c.base = kv.base, c.page_bytes = kv.page_bytes, c.page_tokens = kv.page_tokens, c.format = RowFormat(kv.format);
  c.causal = mask.causal, c.window = mask.window, c.scale = scale, c.merge = how == Attend::merge;
  c.taken = reinterpret_cast<unsigned*>(attention_taken_.data());
  c.o = o.f32(), c.o_row = o.stride[0], c.o_head = o.stride[1];
  c.lse = lse.f32(), c.lse_row = lse.stride[0], c.lse_head = lse.stride[1];
  if (const SpanTable* staged = inputs_.find(spans, kv.page_tokens)) {
    c.spans = *staged;
  } else {
    require(!graphs_.recording(), "other spans in a step that repeats");
    std::vector<GpuSpan> table;
    std::vector<int32_t> pages;
    list_spans(spans, kv.page_tokens, table, pages);
    c.spans.count = int(table.size());
    for (const Span& s : spans) c.spans.most_queries = std::max(c.spans.most_queries, s.count);
    c.one = table[0], c.page = pages.empty() ? 0 : pages[0];
    if (table.size() > 1) c.spans.spans = on_gpu(std::span<const GpuSpan>(table));
    if (pages.size() > 1 || table.size() > 1) {
      pages.push_back(0);
      c.spans.pages = on_gpu(std::span<const int32_t>(pages));
    }
  }
  // A step that repeats comes back with longer contexts.
  for (const Span& s : spans) c.most_seen = std::max(c.most_seen, key_ ? most_context : s.kv_count);
  if (!hopper() || !attend_tiles_takes(c)) return attend_portable(c, stream_);
  const size_t bytes = attend_tiles_scratch_bytes(c);
  attend_tiles(c, bytes > 0 ? scratch_.bytes(bytes) : nullptr, stream_);
}

}  // namespace mla::cuda
