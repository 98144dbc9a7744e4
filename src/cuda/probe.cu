// The mean of several passes over memory, and of several large products.
#include "cuda/hopper.h"
#include "cuda/memory.h"
#include "cuda/probe.h"
#include "cuda/product.h"

#include <algorithm>

namespace mla::cuda {
namespace {

__global__ void fill_kernel(uint32_t* to, int64_t words, uint32_t mask, uint32_t bits) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = (uint32_t(i) * 2654435761u & mask) | bits;
}

__global__ void __launch_bounds__(1024) read_kernel(const uint4* from, int64_t count, uint32_t* to) {
  uint32_t sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = __ldcs(from + i), b = __ldcs(from + i + step), c = __ldcs(from + i + 2 * step), d = __ldcs(from + i + 3 * step);
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  if (sum == 0x12345678) *to = sum;  // so that nothing is left out
}

// Times `once` again and again; returns the mean seconds.
template <class Once>
double mean_seconds(cudaStream_t stream, double seconds, Once once) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  double total = 0;
  int passes = 0;
  once();
  for (; passes < 3 || (total < seconds && passes < 200); ++passes) {
    check(cudaEventRecord(begin, stream));
    once();
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    total += ms * 1e-3;
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return total / passes;
}

size_t free_bytes() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace

double probe_read(cudaStream_t stream, double seconds) {
  const size_t bytes = std::min<size_t>(size_t(2) << 30, free_bytes() / 2 / 4096 * 4096);
  const GpuBuffer buffer(bytes);
  auto* words = reinterpret_cast<uint32_t*>(buffer.data());
  fill_kernel<<<1024, 256, 0, stream>>>(words, int64_t(bytes / 4), ~0u, 0);
  const double one = mean_seconds(
      stream, seconds, [&] { read_kernel<<<264, 1024, 0, stream>>>(reinterpret_cast<const uint4*>(words), int64_t(bytes / 16), words); });
  check(cudaGetLastError());
  return double(bytes) / one * 1e-9;
}

double probe_bf16(cudaStream_t stream, double seconds) {
  int n = 8192;
  while (size_t(n) * size_t(n) * 8 > free_bytes() / 2) n /= 2;
  const size_t count = size_t(n) * size_t(n);
  const GpuBuffer w(count * 2), x(count * 2), y(count * 4);
  // Random mantissas and signs, exponents near 1.
  fill_kernel<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(w.data()), int64_t(count / 2), 0x80ff80ffu, 0x3f003f00u);
  fill_kernel<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(x.data()), int64_t(count / 2), 0x80ff80ffu, 0x3f003f00u);
  Product p{};
  p.part[0] = {packed(DType::bf16, n, n), {}, {y.data(), false, n, 0, nullptr, false}};
  p.part[0].w.data = w.data();
  p.parts = 1, p.matrices = 1, p.n = p.most = n;
  p.x = {x.data(), true, n, 0, nullptr};
  const double one = mean_seconds(stream, seconds, [&] {
    hopper() ? product_gemm(p, {x.data(), n, n, 256}, stream) : product_gemv(p, stream);
  });
  return 2.0 * double(n) * double(n) * double(n) / one * 1e-9;
}

}  // namespace mla::cuda
