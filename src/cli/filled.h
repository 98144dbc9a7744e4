// Caches filled with random rows, for measuring attention at a depth without running a prompt first.
#pragma once

#include "device/device.h"
#include "model/cache.h"

#include <cstdint>

namespace mla {

// Grows the sequence by n tokens and stores random rows for them in every layer; false when the pool has no room.
bool fill_random(LatentCache& cache, int sequence, int64_t n, Device& device);

// The median; raises Error for no values.
double median(std::vector<double> values);

}  // namespace mla
