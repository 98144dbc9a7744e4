// The gate of a mixture: routing by scores, and for few tokens norm, router and routing as work of a few blocks.
#include "cuda/gate.h"

#include "cuda/cuda.h"
#include "cuda/product_gemv.cuh"

#include <algorithm>

namespace mla::cuda {
namespace {

// Scores are not negative, so that their bits order them; those out of the running and those that are no numbers come last.
__device__ uint32_t order_of(float score) { return score >= 0 ? __float_as_uint(score) + 1 : 0; }

// Of the lanes' best the best, the lower index where equal; where none is left, `none`.
__device__ int best_of_warp(uint32_t& order, int index, int none) {
  const uint32_t best = __reduce_max_sync(~0u, order);
  const auto at = int(__reduce_min_sync(~0u, order == best ? uint32_t(index) : uint32_t(none)));
  order = best;
  return at;
}

// A warp turns a token's logits, in shared memory, into its experts: softmax over all, the best groups, the best experts in them
// (eq. 20-22 and section 2.2.2).
__device__ void route_token(float* score, const RouterConfig& c, int lane, int32_t* expert, float* weight) {
  float most = -INFINITY, total = 0;
  for (int e = lane; e < c.experts; e += 32) most = fmaxf(most, score[e]);
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  for (int e = lane; e < c.experts; e += 32) total += score[e] = expf(score[e] - most);
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  for (int e = lane; e < c.experts; e += 32) score[e] /= total;
  __syncwarp();
  if (c.gating == Gating::group_limited_greedy) {
    const int size = c.experts / c.groups;
    uint64_t kept = 0;
    for (int taken = 0; taken < c.top_groups; ++taken) {
      uint32_t top = 0;
      int group = c.groups;
      for (int g = lane; g < c.groups; g += 32) {
        if (kept >> g & 1) continue;
        uint32_t best = 0;
        for (int i = 0; i < size; ++i) best = max(best, order_of(score[g * size + i]));
        if (best > top || group == c.groups) top = best, group = g;
      }
      kept |= uint64_t(1) << best_of_warp(top, group, c.groups);
    }
    for (int e = lane; e < c.experts; e += 32)
      if (!(kept >> (e / size) & 1)) score[e] = -INFINITY;
    __syncwarp();
  }
  float sum = 0, own = 0;
  for (int k = 0; k < c.top_k; ++k) {
    uint32_t top = 0;
    int at = c.experts;
    for (int e = lane; e < c.experts; e += 32)
      if (order_of(score[e]) > top) top = order_of(score[e]), at = e;
    at = best_of_warp(top, at, c.experts);
    // Scores that are no numbers route anywhere rather than out of bounds.
    const float g = top > 0 ? __uint_as_float(top - 1) : 0;
    if (top == 0) at = k;
    if (lane == 0) expert[k] = at, score[at] = -INFINITY;
    if (lane == k) own = g;
    sum += g;
    __syncwarp();
  }
  if (lane < c.top_k) weight[lane] = own * (c.renormalise && c.top_k > 1 ? 1 / (sum + 1e-20f) : c.scale);
}

// A token a warp.
__global__ void route_kernel(const float* logits, int64_t row, int n, RouterConfig c, int32_t* expert, float* weight) {
  begin_kernel();
  extern __shared__ float scores[];
  const int token = int(blockIdx.x * blockDim.y + threadIdx.y), lane = int(threadIdx.x);
  if (token >= n) return;
  float* score = scores + threadIdx.y * unsigned(c.experts);
  for (int e = lane; e < c.experts; e += 32) score[e] = logits[token * row + e];
  route_token(score, c, lane, expert + int64_t(token) * c.top_k, weight + int64_t(token) * c.top_k);
}

void check_routing(const RouterConfig& c, int64_t n, const Routing& out) {
  require(c.top_k > 0 && c.top_k <= std::min(c.experts, 32), "routing to so many experts", out.expert);
  require(out.expert.count() == n * c.top_k && out.weight.count() == n * c.top_k && out.expert.contiguous() && out.weight.contiguous(),
          "routing", out.expert, out.weight);
  require(c.gating != Gating::group_limited_greedy || (c.groups > 0 && c.groups <= 64 && c.experts % c.groups == 0 && c.top_groups > 0 &&
                                                       c.top_groups <= c.groups && c.top_k <= c.experts / c.groups * c.top_groups),
          "routing by these groups", out.expert);
}

// A token has a few blocks; each norms it for itself and has a share of the experts, a warp one at a time, whose weights are on their way
// before the token is there. The first block waits for all scores and routes; the blocks that it waits for come right behind it. A load
// takes long while the product's blocks fill the memory's queues, so as few as can be depend on one another.
struct GateFront {
  static constexpr int token_blocks = 8, warps = gemv_warps, loads = 16, pass_columns = loads * 128;
  Gate g;

  __host__ __device__ int blocks() const { return g.tokens * token_blocks; }
  size_t shared_bytes() const { return (size_t(round_up(g.router.cols, 4)) + size_t(g.config.experts)) * 4; }
  __device__ void run(int block, uint8_t* memory, bool next_at_once) const {
    __shared__ float part[warps];
    const int d = g.router.cols, experts = g.config.experts, each = (experts + token_blocks - 1) / token_blocks;
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, rank = block % token_blocks, token = block / token_blocks;
    const int first = rank * each, count = max(0, min(each, experts - first));
    auto* h = reinterpret_cast<float*>(memory);
    float4 w[loads];
    auto fetch = [&](int e, int from) {
      const auto* row = reinterpret_cast<const float*>(g.router.codes(0, first + e));
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        const int at = from + i * 128 + lane * 4;
        w[i] = at < d ? *reinterpret_cast<const float4*>(row + at) : float4{};  // rows end in zeros
      }
    };
    if (warp < count) fetch(warp, 0);
    prefetch_floats(g.norm, d);
    begin_kernel(next_at_once);
    const float* x = g.x + token * g.x_row;
    float square = 0;
#pragma unroll 2
    for (int i = thread * 4; i < d; i += 4 * gemv_threads) {
      const float4 v = four(x, i, d), n = four(g.norm, i, d);
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      *reinterpret_cast<float4*>(h + i) = {v.x * n.x, v.y * n.y, v.z * n.z, v.w * n.w};
    }
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
    if (lane == 0) part[warp] = square;
    __syncthreads();
    square = part[lane % warps];
    for (int step = warps / 2; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
    const float scale = rsqrtf(square / float(d) + g.eps);
    float* exchange = g.exchange + token * most_experts;
    for (int e = warp; e < count; e += warps) {
      float sum = 0;
      for (int from = 0; from < d; from += pass_columns) {
        if (e != warp || from > 0) fetch(e, from);
#pragma unroll
        for (int i = 0; i < loads; ++i) {
          const int at = from + i * 128 + lane * 4;
          if (at >= d) break;
          const float4 y = *reinterpret_cast<const float4*>(h + at);
          sum += w[i].x * y.x + w[i].y * y.y + w[i].z * y.z + w[i].w * y.w;
        }
      }
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) hand_over(exchange + first + e, sum * scale);
    }
    for (int i = rank * gemv_threads + thread; i < d; i += token_blocks * gemv_threads) g.h[token * g.h_row + i] = h[i] * scale;
    if (rank > 0 || warp > 0) return;
    float* all = h + (d + 3) / 4 * 4;
    for (int e = lane; e < experts; e += 32) g.scores[token * g.score_row + e] = all[e] = take_over(exchange + e);
    __syncwarp();
    route_token(all, g.config, lane, g.expert + token * g.config.top_k, g.weight + token * g.config.top_k);
  }

 private:
  // Words that say that nothing is there are one NaN of many; the one that is handed over is another.
  static constexpr uint32_t none = ~0u, no_number = 0x7fffffff;
  __device__ static void put(float* to, uint32_t bits) { *reinterpret_cast<volatile uint32_t*>(to) = bits; }
  __device__ static void hand_over(float* to, float x) { put(to, isnan(x) ? no_number : __float_as_uint(x)); }
  __device__ static float take_over(float* from) {
    uint32_t bits;
    do bits = *reinterpret_cast<volatile uint32_t*>(from);
    while (bits == none);
    put(from, none);
    return __uint_as_float(bits);
  }
};

}  // namespace

void CudaDevice::route(Tensor logits, const RouterConfig& c, Routing out) {
  const int64_t n = logits.shape[0];
  require(logits.rank == 2 && logits.shape[1] == c.experts && logits.stride[1] == 1, "routing", logits);
  check_routing(c, n, out);
  fresh_choice_ = out.expert.data;
  const unsigned tokens = n >= 4 ? 4 : 1;
  launch(route_kernel, unsigned(ceil_div(n, tokens)), dim3(32, tokens), tokens * size_t(c.experts) * 4, stream_, logits.f32(),
         logits.stride[0], int(n), c, out.expert.as<int32_t>(), out.weight.f32());
}

void product_behind_gate(const Product& p, const Gate& gate, cudaStream_t stream) {
  launch_gemv<Kind::gated, gemv_warps>(p, nullptr, GateFront{gate}, stream);
}

void CudaDevice::gate(Tensor x, Tensor norm, float eps, Tensor h, const Weight& router, const RouterConfig& c, Tensor scores, Routing out,
                      const FfnWeights& shared) {
  const int64_t n = x.shape[0], d = x.shape[1];
  const GateFront front{{x.f32(), norm.f32(), h.f32(), scores.f32(), x.stride[0], h.stride[0], scores.stride[0], eps, int(n),
                         packed(router), c, out.expert.as<int32_t>(), out.weight.f32(), reinterpret_cast<float*>(gate_exchange_.data())}};
  if (n == 0 || n > few_rows || router.dtype != DType::f32 || c.experts > most_experts || front.shared_bytes() > most_shared_bytes())
    return Device::gate(x, norm, eps, h, router, c, scores, out, shared);
  require(x.rank == 2 && h.rank == 2 && h.shape[0] == n && h.shape[1] == d && norm.count() == d && x.stride[1] == 1 && h.stride[1] == 1,
          "a gate", x, h);
  require(router.count == 1 && router.rows == c.experts && router.cols == d && scores.rank == 2 && scores.shape[0] == n &&
              scores.shape[1] == c.experts && scores.stride[1] == 1,
          "a gate of this router", x, scores);
  check_routing(c, n, out);
  fresh_choice_ = out.expert.data;
  const bool joins = shared.gate.dtype == shared.up.dtype && shared.gate.dtype != DType::f32 && shared.down.dtype != DType::f32;
  if (shared.gate && joins) return feed(x, shared, nullptr, x, &front.g);
  launch_front(front, stream_);
  if (shared.gate) ffn(h, shared, nullptr, x);
}

}  // namespace mla::cuda
