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
    fail_input("the GPU has no room for {:.1f} MB more: {:.1f} of its {:.1f} MB are free", 1e-6 * double(bytes), 1e-6 * double(free),
               1e-6 * double(total));
  }
  check(cudaGetLastError());
  data_ = static_cast<std::byte*>(memory);
}

GpuBuffer::~GpuBuffer() {
  if (data_) cudaFree(data_);
}

}  // namespace mla::cuda
