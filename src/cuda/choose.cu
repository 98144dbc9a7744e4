// Sampling: a block chooses one row's id.
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int block_threads = 1024;

struct Best {
  float logit;
  int id;
  __device__ void join(float other, int at) {
    if (other > logit || (other == logit && at < id)) logit = other, id = at;
  }
};

__device__ Best best_of_block(Best b) {
  __shared__ Best part[block_threads / 32];
  for (int step = 16; step > 0; step /= 2) b.join(__shfl_xor_sync(~0u, b.logit, step), __shfl_xor_sync(~0u, b.id, step));
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = b;
  __syncthreads();
  b = part[threadIdx.x % 32];
  for (int step = 16; step > 0; step /= 2) b.join(__shfl_xor_sync(~0u, b.logit, step), __shfl_xor_sync(~0u, b.id, step));
  return b;
}

__global__ void __launch_bounds__(block_threads)
    choose_kernel(const float* logits, int64_t stride, int vocab, float inverse, const double* at, int32_t* ids, int32_t* host_ids) {
  begin_kernel();
  auto choose = [=](int id) { ids[blockIdx.x] = host_ids[blockIdx.x] = id; };
  __shared__ double sums[block_threads];
  logits += blockIdx.x * stride;
  const int thread = int(threadIdx.x);
  Best best{-INFINITY, vocab};
  bool bad = false;
  for (int i = thread; i < vocab; i += block_threads) best.join(logits[i], i), bad = bad || isnan(logits[i]);
  best = best_of_block(best);
  if (__syncthreads_or(bad) || best.id >= vocab || !isfinite(best.logit)) {
    if (thread == 0) choose(-1);
    return;
  }
  if (inverse == 0) {
    if (thread == 0) choose(best.id);
    return;
  }
  // Threads have neighbouring stretches of ids; a running sum over them finds the stretch, its thread the id.
  const int share = (vocab + block_threads - 1) / block_threads, begin = min(vocab, thread * share), end = min(vocab, begin + share);
  double own = 0;
  for (int i = begin; i < end; ++i) own += expf((logits[i] - best.logit) * inverse);
  sums[thread] = own;
  __syncthreads();
  for (int step = 1; step < block_threads; step *= 2) {
    const double before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  const double target = at[blockIdx.x] * sums[block_threads - 1], before = thread > 0 ? sums[thread - 1] : 0;
  if (thread == 0) choose(vocab - 1);  // where rounding leaves no stretch
  __syncthreads();
  if (!(before <= target && target < sums[thread])) return;
  double left = target - before;
  int id = begin;
  for (; id + 1 < end; ++id)
    if ((left -= expf((logits[id] - best.logit) * inverse)) < 0) break;
  choose(id);
}

}  // namespace

bool CudaDevice::choose(Tensor logits, double temperature, std::span<const double> at) {
  const int64_t n = logits.shape[0];
  require(logits.rank == 2 && logits.stride[1] == 1 && (temperature == 0 || int64_t(at.size()) == n), "a choice of ids", logits);
  check(cudaEventSynchronize(choice_.made));
  if (choice_.ids.bytes() < size_t(n) * 4) {
    const auto room = size_t(std::max<int64_t>(2 * n, 64));
    graphs_.clear();  // recorded steps know where the ids were
    memory_.wait();
    choice_.ids = GpuBuffer(room * 4), choice_.host = PinnedBuffer(room * 12);
  }
  choice_.count = int(n);
  auto* draws = reinterpret_cast<double*>(choice_.host.data());
  if (temperature != 0) std::copy(at.begin(), at.end(), draws);
  launch(choose_kernel, unsigned(n), block_threads, 0, stream_, logits.f32(), logits.stride[0], int(logits.shape[1]),
         temperature == 0 ? 0.0f : float(1 / temperature), draws, reinterpret_cast<int32_t*>(choice_.ids.data()), choice_.host_ids());
  check(cudaEventRecord(choice_.made, stream_));
  return true;
}

void CudaDevice::chosen(std::span<int32_t> ids) {
  require(int64_t(ids.size()) == choice_.count, "as many ids as were chosen");
  check(cudaEventSynchronize(choice_.made));
  std::copy_n(choice_.host_ids(), ids.size(), ids.begin());
}

}  // namespace mla::cuda
