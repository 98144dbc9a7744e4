// The turns of pinned memory, each with an event that says when the GPU has it.
#include "cuda/staging.h"

#include <algorithm>
#include <cstring>

namespace mla::cuda {
namespace {

constexpr int64_t task_bytes = 256 << 10;

}  // namespace

Staging::~Staging() {
  for (const Turn& turn : turns_)
    if (turn.copied) cudaEventDestroy(turn.copied);
}

void Staging::upload(const std::byte* from, int64_t pitch, int64_t row_bytes, int64_t rows, std::byte* to) {
  const auto bytes = size_t(rows * row_bytes);
  if (bytes == 0) return;
  Turn& turn = turns_[next_++ % std::size(turns_)];
  if (turn.copied)
    check(cudaEventSynchronize(turn.copied));
  else
    check(cudaEventCreateWithFlags(&turn.copied, cudaEventDisableTiming));
  if (turn.memory.bytes() < bytes) turn.memory = PinnedBuffer(std::max(bytes, turn_bytes));
  const int64_t at_once = std::max<int64_t>(1, task_bytes / row_bytes);
  threads_.parallel((rows + at_once - 1) / at_once, [&](int64_t task, int) {
    for (int64_t r = task * at_once; r < std::min(rows, (task + 1) * at_once); ++r)
      std::memcpy(turn.memory.data() + r * row_bytes, from + r * pitch, size_t(row_bytes));
  });
  check(cudaMemcpyAsync(to, turn.memory.data(), bytes, cudaMemcpyHostToDevice, stream_));
  check(cudaEventRecord(turn.copied, stream_));
}

}  // namespace mla::cuda
