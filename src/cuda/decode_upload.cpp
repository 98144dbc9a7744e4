// Brings a plan to the GPU in one copy.
#include "cuda/decode.h"

#include <cstring>

namespace mla::cuda {

UploadedPlan::UploadedPlan(const DecodePlan& plan, cudaStream_t stream) {
  std::vector<std::byte> bytes;
  auto append = [&bytes]<class T>(const std::vector<T>& part) {
    const size_t at = (bytes.size() + 63) / 64 * 64;
    bytes.resize(at + part.size() * sizeof(T));
    if (!part.empty()) std::memcpy(bytes.data() + at, part.data(), part.size() * sizeof(T));
    return at;
  };
  const size_t parts = append(plan.parts), items = append(plan.items), merges = append(plan.merges), pages = append(plan.pages);
  memory_ = GpuBuffer(bytes.size());
  // The source is pageable, so the call returns when it has been read.
  check(cudaMemcpyAsync(memory_.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream));
  view_ = {plan.row_blocks,
           int(plan.parts.size()),
           int(plan.items.size()),
           plan.slots,
           int(plan.merges.size()),
           plan.most_rows,
           plan.most_pieces,
           reinterpret_cast<const DecodePart*>(memory_.data() + parts),
           reinterpret_cast<const DecodeItem*>(memory_.data() + items),
           reinterpret_cast<const DecodeMerge*>(memory_.data() + merges),
           reinterpret_cast<const int32_t*>(memory_.data() + pages)};
}

}  // namespace mla::cuda
