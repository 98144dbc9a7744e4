// Rows of a tensor to be written, found in or derived from a checkpoint that may hold it in another shape or order.
#pragma once

#include "io/checkpoint.h"
#include "io/writer.h"
#include "model/config.h"

#include <functional>
#include <vector>

namespace mla {

struct TensorSource {
  std::function<Tensor(int64_t row)> row;  // thread-safe
};

// The rows of `plan`: as they are, out of stacks or into stacks of experts, kv_b split or joined, q and k reordered. `pairs`: the file to
// be written holds rotary rows as pairs (2i, 2i+1). Raises Error where the checkpoint's shapes contradict its configuration.
TensorSource open_source(const Checkpoint& checkpoint, const Config& config, const TensorPlan& plan, bool pairs);

// GGUF's rope_freqs: what Llama 3's scaling divides each frequency by.
std::vector<float> rope_divisors(const Config& config);

// The other way: sets the config's scaling to one of Llama 3's that gives these divisors. Raises Error if none does.
void recover_llama3(Config& config, const StoredTensor& divisors);

}  // namespace mla
