// Memory of the GPU, owned; and copies to and from it.
#pragma once

#include "cuda/error.h"

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace mla::cuda {

// Raises Error with what was asked and what is free when there is not enough.
class GpuBuffer {
 public:
  GpuBuffer() = default;
  explicit GpuBuffer(size_t bytes);
  GpuBuffer(GpuBuffer&& other) noexcept { swap(other); }
  GpuBuffer& operator=(GpuBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~GpuBuffer();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(GpuBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

template <class T>
GpuBuffer upload(std::span<const T> from) {
  GpuBuffer buffer(from.size_bytes());
  check(cudaMemcpy(buffer.data(), from.data(), from.size_bytes(), cudaMemcpyHostToDevice));
  return buffer;
}

template <class T>
std::vector<T> download(const std::byte* from, size_t count) {
  std::vector<T> to(count);
  check(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

}  // namespace mla::cuda
