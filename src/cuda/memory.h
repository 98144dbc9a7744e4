// Memory of the GPU: as the engine takes it, and owned, for what the kernels keep.
#pragma once

#include "core/memory.h"
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
  std::byte* release() { return std::exchange(data_, nullptr); }  // to whoever frees it

 private:
  void swap(GpuBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// The GPU's memory in the order of one stream.
class GpuMemory final : public Memory {
 public:
  explicit GpuMemory(cudaStream_t stream) : stream_(stream) {}
  Place place() const override { return Place::device; }
  std::byte* take(size_t bytes) override;
  void give_back(std::byte* data, size_t bytes) noexcept override;
  void upload(const void* from, void* to, size_t bytes) override;
  void download(const void* from, void* to, size_t bytes) override;
  void copy(const void* from, void* to, size_t bytes) override;
  void wait() override { check(cudaStreamSynchronize(stream_)); }
  double free_bytes() const override;

 private:
  cudaStream_t stream_;
};

// The host's memory that the copy engines reach by themselves.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PinnedBuffer();
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(PinnedBuffer& other) noexcept {
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
