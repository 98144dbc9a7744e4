// Gated feed-forward networks and stacks of them. Which expert has which tokens is found out on the GPU, and the host never asks: grids
// are as large as the worst case, and blocks without work end at once. Each token sums its experts in the order of its routing.
#include "cuda/cuda.h"
#include "cuda/elements.cuh"
#include "cuda/gate.h"
#include "cuda/launch.cuh"
#include "cuda/linear.h"

#include <cuda_bf16.h>

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int group_threads = 1024;
constexpr int few_code_tokens = 2;  // up to so many, experts in codes are multiplied as they stream by; of bf16 up to few_rows

// A place is a token's turn at an expert; places lie expert by expert.
struct Groups {
  Run* run;  // of one expert each, with at most `tile` tokens
  int32_t* run_count;
  int32_t* token;  // [places]
  int32_t* place;  // [n, k], of each turn
};

__global__ void __launch_bounds__(group_threads) group_kernel(const int32_t* expert, int places, int k, int experts, int tile, Groups to) {
  begin_kernel();
  __shared__ int32_t count[most_experts], first[most_experts];
  const int thread = int(threadIdx.x);
  for (int e = thread; e < experts; e += group_threads) count[e] = 0;
  __syncthreads();
  for (int p = thread; p < places; p += group_threads) atomicAdd(&count[expert[p]], 1);
  __syncthreads();
  if (thread < 32) {
    // Running sums of the places and of the runs.
    int32_t places_before = 0, runs_before = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + thread;
      const int32_t n = e < experts ? count[e] : 0, runs = tile ? (n + tile - 1) / tile : n > 0;
      int32_t places_to = n, runs_to = runs;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t a = __shfl_up_sync(~0u, places_to, step), b = __shfl_up_sync(~0u, runs_to, step);
        if (thread >= step) places_to += a, runs_to += b;
      }
      const int32_t begin = places_before + places_to - n, run = runs_before + runs_to - runs;
      if (e < experts) first[e] = begin;
      for (int i = 0; i < runs; ++i) to.run[run + i] = {e, begin + i * tile, tile ? min(tile, n - i * tile) : n};
      places_before += __shfl_sync(~0u, places_to, 31);
      runs_before += __shfl_sync(~0u, runs_to, 31);
    }
    if (thread == 0) *to.run_count = runs_before;
  }
  __syncthreads();
  for (int p = thread; p < places; p += group_threads) {
    const int32_t at = atomicAdd(&first[expert[p]], 1);
    to.token[at] = p / k;
    to.place[p] = at;
  }
}

__global__ void silu_kernel(const float* gate, const float* up, float* hidden, int64_t count) {
  begin_kernel();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) hidden[i] = silu(gate[i]) * up[i];
}

// out[token] += Σ weight · y[place]; without places, turns lie in order
template <class Y>
__global__ void combine_kernel(const Y* y, const int32_t* place, const float* weight, int k, int d, float* out, int64_t stride) {
  begin_kernel();
  const int64_t token = blockIdx.y;
  const int c = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= d) return;
  float sum = out[token * stride + c];
  for (int j = 0; j < k; ++j) sum += weight[token * k + j] * float(y[int64_t(place ? place[token * k + j] : token * k + j) * d + c]);
  out[token * stride + c] = sum;
}

// How runs are cut for the kernels that will multiply (Product::tile), both of them by the gate's type.
int run_tile(DType type, int64_t n, int64_t places, int64_t experts) {
  const int64_t average = places / experts;
  if (!hopper() || type == DType::f32 || n <= (type == DType::bf16 ? few_rows : few_code_tokens)) return 0;
  return average <= 8 ? 16 : average <= 16 ? 32 : average <= 48 ? 64 : 128;
}

}  // namespace

void CudaDevice::ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) { feed(x, w, routing, out, nullptr); }

void CudaDevice::feed(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out, const Gate* in_front) {
  const int64_t n = x.shape[0], d = x.shape[1], width = w.gate.rows;
  require(x.rank == 2 && out.rank == 2 && out.shape[0] == n && out.shape[1] == d, "a network", x, out);
  require(w.gate.cols == d && w.up.cols == d && w.up.rows == width && w.down.rows == d && w.down.cols == width &&
              w.up.count == w.gate.count && w.down.count == w.gate.count,
          "a network of these weights", x);
  require(!routing || (routing->expert.shape[0] == n && routing->expert.contiguous() && routing->weight.contiguous() &&
                       routing->weight.count() == routing->expert.count() && w.gate.count <= most_experts),
          "this routing", x);
  if (n == 0) return;
  const int k = routing ? int(routing->expert.shape[1]) : 1;
  const int64_t places = n * k;
  if (places == 0) return;
  ArenaScope scope(scratch_);
  const int experts = int(w.gate.count), processors = properties_.multiProcessorCount;
  const PackedMatrix gate = packed(w.gate), up = packed(w.up), down = packed(w.down);
  const bool f32 = gate.type == DType::f32, together = gate.type == up.type && !f32;
  // bf16 between the products where the second is multiplied so.
  const bool narrow = together && down.type != DType::f32;
  const int hidden_row = narrow ? int(round_up(width, 128)) : int(width);
  auto floats = [&](int64_t count) { return static_cast<float*>(scratch_.bytes(size_t(count) * 4)); };

  Product first{};
  first.parts = 1, first.matrices = 1, first.n = int(n), first.most = int(n);
  first.x = {x.data, false, x.stride[0], 0, nullptr};
  if (in_front) first.x.norm = in_front->norm, first.x.eps = in_front->eps;
  Groups groups{};
  if (routing && n == 1) {
    // A single token's turns are its runs.
    first.choice = routing->expert.as<int32_t>(), first.matrices = k, first.choice_is_old = fresh_choice_ != first.choice;
  } else if (routing) {
    const int tile = run_tile(gate.type, n, places, experts);
    const int64_t most_runs = std::min<int64_t>(places, experts) + (tile ? places / tile : 0);
    groups = {static_cast<Run*>(scratch_.bytes(size_t(most_runs) * sizeof(Run))), static_cast<int32_t*>(scratch_.bytes(4)),
              static_cast<int32_t*>(scratch_.bytes(size_t(places) * 4)), static_cast<int32_t*>(scratch_.bytes(size_t(places) * 4))};
    launch(group_kernel, 1, group_threads, 0, stream_, routing->expert.as<int32_t>(), int(places), k, experts, tile, groups);
    first.runs = groups.run, first.run_count = groups.run_count, first.most_runs = int(most_runs);
    first.tile = tile, first.most = int(tile ? std::min<int64_t>(n, tile) : n), first.n = int(places), first.matrices = experts;
    first.x.index = groups.token;
  }

  Product second = first;
  void* hidden = scratch_.bytes(size_t(places) * size_t(hidden_row) * (narrow ? 2 : 4));
  require(!in_front || narrow, "a gate in front of two products");
  const bool code_order = narrow && is_for_gemm(first, gate) && is_for_gemm(second, down) && down.type != DType::bf16;
  if (narrow) {
    first.part[0] = {gate, up, {hidden, narrow, hidden_row, hidden_row, nullptr, false, code_order}};
    if (in_front)
      product_behind_gate(first, *in_front, stream_);
    else
      multiply(first, scratch_, processors, stream_);
  } else {
    ArenaScope halves(scratch_);
    float *g = floats(places * width), *u = floats(places * width);
    first.part[0] = {gate, {}, {g, false, width, width, nullptr, false}};
    multiply(first, scratch_, processors, stream_);
    first.part[0] = {up, {}, {u, false, width, width, nullptr, false}};
    multiply(first, scratch_, processors, stream_);
    launch(silu_kernel, unsigned(ceil_div(places * width, 256)), 256, 0, stream_, g, u, static_cast<float*>(hidden), places * width);
  }
  fresh_choice_ = nullptr;  // the second product comes between the choice and what reads it, and lets nothing in before it has waited
  second.choice_is_old = true;
  second.x = {hidden, narrow, hidden_row, hidden_row, nullptr};
  second.x.code_order = code_order;
  if (!routing) {
    second.part[0] = {down, {}, {out.data, false, out.stride[0], 0, nullptr, true}};
    return multiply(second, scratch_, processors, stream_);
  }
  second.part[0] = {down, {}, {out.data, false, d, 0, nullptr, true}};
  if (product_sum_takes(second)) return product_sum(second, routing->weight.f32(), stream_);
  // Where there are many, they are rounded to bf16, as the activations of any product are.
  const bool many = narrow && n > few_rows;
  void* y = scratch_.bytes(size_t(places * d) * (many ? 2 : 4));
  second.part[0] = {down, {}, {y, many, d, d, nullptr, false}};
  multiply(second, scratch_, processors, stream_);
  auto combine = [&](auto kernel, const auto* from) {
    launch(kernel, dim3(unsigned(ceil_div(d, 256)), unsigned(n)), 256, 0, stream_, from, groups.place, routing->weight.f32(), k, int(d),
           out.f32(), out.stride[0]);
  };
  if (many)
    combine(combine_kernel<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(y));
  else
    combine(combine_kernel<float>, static_cast<const float*>(y));
}

}  // namespace mla::cuda
