// Absorbed decode by plain instructions: one block a (query, head), for any d_c and d_R. The reference for the Hopper kernel.
#include "cuda/cache_rows.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/error.h"

namespace mla::cuda {
namespace {

constexpr int threads = 128, most_columns = 8;  // columns of the output a thread owns

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

__global__ void __launch_bounds__(threads) portable_kernel(const DecodeCall call, const RowFormat format) {
  __shared__ float score[tile_tokens];
  extern __shared__ float q[];  // [d_k]
  const DecodeItem item = call.plan.items[blockIdx.x];
  const int row = int(blockIdx.y), thread = int(threadIdx.x), lane = thread % 32;
  if (row >= item.rows) return;
  const KvLayout layout = call.kv.format.layout;
  const auto* query = static_cast<const __nv_bfloat16*>(call.q) + (int64_t(item.start) * call.n_h + row) * layout.d_k;
  for (int i = thread; i < layout.d_k; i += threads) q[i] = __bfloat162float(query[i]) * call.scale * log2_e;
  __syncthreads();

  auto cache_row = [&](int j) {
    const int64_t page = call.plan.pages[item.table + j / call.kv.page_tokens];
    return call.kv.base + page * call.kv.page_bytes + j % call.kv.page_tokens * int64_t(format.row_bytes);
  };
  const int seen = min(item.kv_count, item.limit + row / call.n_h);
  float o[most_columns] = {}, m = -INFINITY, l = 0;
  for (int first = 0; first < seen; first += tile_tokens) {
    const int n = min(tile_tokens, seen - first);
    for (int j = thread / 32; j < n; j += threads / 32) {
      const std::byte* k = cache_row(first + j);
      float sum = 0;
      for (int i = lane; i < layout.d_k; i += 32) sum += q[i] * read_element(format, k, i);
      sum = warp_sum(sum);
      if (lane == 0) score[j] = sum;
    }
    __syncthreads();
    float next = m;
    for (int j = 0; j < n; ++j) next = fmaxf(next, score[j]);
    const float factor = rescale(m, next);
    m = next, l *= factor;
    for (float& x : o) x *= factor;
    for (int j = 0; j < n; ++j) {
      const float p = exp2f(score[j] - m);
      const std::byte* v = cache_row(first + j);
      l += p;
#pragma unroll
      for (int c = 0; c < most_columns; ++c)
        if (thread + c * threads < layout.d_v) o[c] += p * read_element(format, v, thread + c * threads);
    }
    __syncthreads();
  }
  const int64_t at = int64_t(item.start) * call.n_h + row;
  for (int c = 0; c < most_columns; ++c) {
    const int column = thread + c * threads;
    if (column >= layout.d_v) break;
    const float x = l > 0 ? o[c] / l : 0;
    if (call.out_f32)
      static_cast<float*>(call.o)[at * layout.d_v + column] = x;
    else
      static_cast<__nv_bfloat16*>(call.o)[at * layout.d_v + column] = __float2bfloat16(x);
  }
  if (thread == 0) call.lse[at] = l > 0 ? (m + log2f(l)) * ln_2 : -INFINITY;
}

}  // namespace

void decode_portable(const DecodeCall& call, cudaStream_t stream) {
  const KvLayout& l = call.kv.format.layout;
  require(l.v_in_k && l.heads == 1 && l.d_v <= threads * most_columns, "decode of a latent");
  require(call.plan.slots == 0, "a plan of whole sequences");
  const dim3 grid(unsigned(call.plan.item_count), unsigned(call.plan.most_rows));
  portable_kernel<<<grid, threads, size_t(l.d_k) * 4, stream>>>(call, RowFormat(call.kv.format));
  check(cudaGetLastError());
}

}  // namespace mla::cuda
