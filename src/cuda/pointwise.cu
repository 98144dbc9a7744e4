// Norms, rotation and copies.
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

#include <cuda_bf16.h>

namespace mla::cuda {
namespace {

__device__ float block_sum(float x) {
  __shared__ float part[32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// A row a block.
__global__ void norm_kernel(const float* x, int64_t x_row, const float* weight, float eps, int d, float* y, int64_t y_row) {
  begin_kernel();
  x += blockIdx.x * x_row, y += blockIdx.x * y_row;
  float sum = 0;
  for (int i = int(threadIdx.x); i < d; i += int(blockDim.x)) sum += x[i] * x[i];
  const float scale = rsqrtf(block_sum(sum) / float(d) + eps);
  for (int i = int(threadIdx.x); i < d; i += int(blockDim.x)) y[i] = x[i] * scale * weight[i];
}

__device__ void put(float* y, int64_t at, float x) { y[at] = x; }
__device__ void put(__nv_bfloat16* y, int64_t at, float x) { y[at] = __float2bfloat16(x); }

// A pair a thread, a token a block.
template <class Out>
__global__ void rope_kernel(const float* x, int64_t x_row, int64_t x_head, int heads, int d, const float* cos_sin, bool interleaved, Out* y,
                            int64_t y_row, int64_t y_head) {
  begin_kernel();
  const int half = d / 2;
  x += blockIdx.x * x_row, y += blockIdx.x * y_row, cos_sin += int64_t(blockIdx.x) * d;
  for (int p = int(threadIdx.x); p < heads * half; p += int(blockDim.x)) {
    const int i = p % half, head = p / half, first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1], a = x[head * x_head + first], b = x[head * x_head + second];
    put(y, head * y_head + first, a * c - b * s);
    put(y, head * y_head + second, a * s + b * c);
  }
}

__global__ void copy_kernel(const float* from, int64_t from_row, int64_t from_inner, float* to, int64_t to_row, int64_t to_inner, int inner,
                            int n) {
  begin_kernel();
  from += blockIdx.x * from_row, to += blockIdx.x * to_row;
  for (int i = int(threadIdx.x); i < inner * n; i += int(blockDim.x)) to[i / n * to_inner + i % n] = from[i / n * from_inner + i % n];
}

unsigned threads_for(int64_t elements) { return elements >= 1024 ? 512 : elements >= 256 ? 128 : 32; }

}  // namespace

void CudaDevice::rms_norm(Tensor x, Tensor weight, float eps, Tensor y) {
  const int64_t n = x.shape[0], d = x.shape[1];
  require(x.rank == 2 && y.rank == 2 && y.shape[0] == n && y.shape[1] == d && weight.count() == d && x.stride[1] == 1 && y.stride[1] == 1,
          "a norm", x, y);
  launch(norm_kernel, unsigned(n), threads_for(d), 0, stream_, x.f32(), x.stride[0], weight.f32(), eps, int(d), y.f32(), y.stride[0]);
}

void CudaDevice::rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) {
  require(x.rank == 3 && x.shape[2] % 2 == 0 && x.stride[2] == 1 && cos_sin.shape[0] == x.shape[0] &&
              cos_sin.count() == x.shape[0] * x.shape[2] && cos_sin.contiguous(),
          "a rotation", x, cos_sin);
  require(y.rank == 3 && y.stride[2] == 1 && y.shape[0] == x.shape[0] && y.shape[1] == x.shape[1] && y.shape[2] == x.shape[2] &&
              (y.dtype == DType::f32 || y.dtype == DType::bf16),
          "a rotation into this", y, x);
  auto run = [&](auto kernel, auto* to) {
    launch(kernel, unsigned(x.shape[0]), threads_for(x.shape[1] * x.shape[2] / 2), 0, stream_, x.f32(), x.stride[0], x.stride[1],
           int(x.shape[1]), int(x.shape[2]), cos_sin.f32(), interleaved, to, y.stride[0], y.stride[1]);
  };
  if (y.dtype == DType::bf16)
    run(rope_kernel<__nv_bfloat16>, y.as<__nv_bfloat16>());
  else
    run(rope_kernel<float>, y.f32());
}

void CudaDevice::copy(Tensor from, Tensor to) {
  bool same = from.rank == to.rank && from.rank >= 2 && from.rank <= 3;
  for (int i = 0; same && i < from.rank; ++i) same = from.shape[i] == to.shape[i];
  const int last = from.rank - 1;
  require(same && from.stride[last] == 1 && to.stride[last] == 1, "a copy", from, to);
  const bool inner = from.rank == 3;
  const int64_t elements = from.shape[last] * (inner ? from.shape[1] : 1);
  launch(copy_kernel, unsigned(from.shape[0]), threads_for(elements), 0, stream_, from.f32(), from.stride[0], inner ? from.stride[1] : 0,
         to.f32(), to.stride[0], inner ? to.stride[1] : 0, inner ? int(from.shape[1]) : 1, int(from.shape[last]));
}

}  // namespace mla::cuda
