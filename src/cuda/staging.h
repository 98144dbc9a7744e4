// Host data to the GPU by way of pinned memory in turns: the host's threads fill one while the copy engine empties those before it.
#pragma once

#include "core/threads.h"
#include "cuda/memory.h"

namespace mla::cuda {

class Staging {
 public:
  static constexpr size_t turn_bytes = size_t(8) << 20;  // rows of more in one call cost memory

  Staging(cudaStream_t stream, Threads& threads) : stream_(stream), threads_(threads) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // `rows` rows of `row_bytes` that are `pitch` bytes apart, to `to` without gaps, in the stream's order. They have been read on return.
  void upload(const std::byte* from, int64_t pitch, int64_t row_bytes, int64_t rows, std::byte* to);

 private:
  struct Turn {
    PinnedBuffer memory;
    cudaEvent_t copied = nullptr;
  };

  cudaStream_t stream_;
  Threads& threads_;
  Turn turns_[4];
  int next_ = 0;
};

}  // namespace mla::cuda
