// Takes and gives back the GPU's memory.
#include "cuda/memory.h"

#include "core/check.h"

namespace mla::cuda {

GpuBuffer::GpuBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes) == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // the failure is not for the next call to report
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    fail_input(
        "the GPU has no room for {:.1f} MB more: {:.1f} of its {:.1f} MB are free; shorten the context, run fewer sequences, or take a "
        "smaller type of weights or cache",
        1e-6 * double(bytes), 1e-6 * double(free), 1e-6 * double(total));
  }
  check(cudaGetLastError());
  data_ = static_cast<std::byte*>(memory);
}

GpuBuffer::~GpuBuffer() {
  if (data_) cudaFree(data_);
}

std::byte* GpuMemory::take(size_t bytes) {
  GpuBuffer buffer(bytes);
  check(cudaMemsetAsync(buffer.data(), 0, bytes, stream_));
  return buffer.release();
}

void GpuMemory::give_back(std::byte* data, size_t) noexcept { cudaFree(data); }

void GpuMemory::upload(const void* from, void* to, size_t bytes) {
  // From pageable memory the call returns when `from` has been read.
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
}

void GpuMemory::download(const void* from, void* to, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
  wait();
}

void GpuMemory::copy(const void* from, void* to, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
}

double GpuMemory::free_bytes() const {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total));
  return double(free);
}

PinnedBuffer::PinnedBuffer(size_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  if (bytes > 0) check(cudaMallocHost(&memory, bytes));
  data_ = static_cast<std::byte*>(memory);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_) cudaFreeHost(data_);
}

}  // namespace mla::cuda
