// Random data, reading, and the vendor's matrix product.
#include "kernels.h"

#include "cuda/error.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

namespace mla::cuda {
namespace {

__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ float draw(uint64_t seed, size_t i) {
  const uint64_t bits = mix(seed + i * 0x9e3779b97f4a7c15ull);
  const float u = (float(uint32_t(bits)) + 0.5f) * 0x1p-32f, v = float(uint32_t(bits >> 32)) * 0x1p-32f;
  return fminf(1, fmaxf(-1, 0.1f * sqrtf(-2 * logf(u)) * cospif(2 * v)));
}

__global__ void fill_kernel(__nv_bfloat16* to, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
    to[i] = __float2bfloat16(draw(seed, i));
}

__global__ void fill_f8_kernel(std::byte* to, size_t rows, uint64_t seed) {
  constexpr int codes = 512, kept = 64, row_bytes = codes + 2 * kept + 16;
  constexpr float scale = 0x1p-8f;
  for (size_t r = blockIdx.x; r < rows; r += gridDim.x) {
    std::byte* row = to + r * row_bytes;
    for (int e = int(threadIdx.x); e < codes + kept; e += int(blockDim.x)) {
      const float x = draw(seed, r * (codes + kept) + size_t(e));
      if (e < codes)
        row[e] = std::byte(__nv_cvt_float_to_fp8(x / scale, __NV_SATFINITE, __NV_E4M3));
      else
        reinterpret_cast<__nv_bfloat16*>(row + codes)[e - codes] = __float2bfloat16(x);
    }
    if (threadIdx.x < 4) reinterpret_cast<float*>(row + codes + 2 * kept)[threadIdx.x] = scale;
  }
}

__global__ void read_kernel(const uint4* from, size_t count, float* sink) {
  uint32_t sum = 0;
  const size_t step = size_t(gridDim.x) * blockDim.x;
  size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    sum += (a.x ^ a.y ^ a.z ^ a.w) + (b.x ^ b.y ^ b.z ^ b.w) + (c.x ^ c.y ^ c.z ^ c.w) + (d.x ^ d.y ^ d.z ^ d.w);
  }
  for (; i < count; i += step) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  if (sum == 0x12345678) *sink = 1;  // keeps the reads
}

}  // namespace

void fill_normal(void* to, size_t count, uint64_t seed, cudaStream_t stream) {
  fill_kernel<<<2048, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(to), count, seed);
  check(cudaGetLastError());
}

void fill_f8_rows(void* to, size_t rows, uint64_t seed, cudaStream_t stream) {
  fill_f8_kernel<<<132 * 8, 192, 0, stream>>>(static_cast<std::byte*>(to), rows, seed);
  check(cudaGetLastError());
}

void read_all(const void* from, size_t bytes, float* sink, cudaStream_t stream) {
  read_kernel<<<132 * 8, 256, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16, sink);
  check(cudaGetLastError());
}

void multiply(const void* a, const void* b, void* d, int n, cudaStream_t stream) {
  static cublasHandle_t handle = [] {
    cublasHandle_t made;
    require(cublasCreate(&made) == CUBLAS_STATUS_SUCCESS, "cuBLAS starts");
    return made;
  }();
  const float one = 1, zero = 0;
  require(cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS, "cuBLAS takes the stream");
  require(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a, CUDA_R_16BF, n, b, CUDA_R_16BF, n, &zero, d, CUDA_R_16BF, n,
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS,
          "cuBLAS multiplies");
}

}  // namespace mla::cuda
