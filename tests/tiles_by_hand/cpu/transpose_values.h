// Stands in for src/cpu/transpose_values.h, in plain C++.
#pragma once

#include "cpu/attention_lanes_kernels.h"

namespace mla {
namespace {

inline void transpose_values(const LaneTile<InBf16>& tile, int padded, int64_t d_v, uint16_t* values) {
  for (int t = 0; t < padded; ++t)
    for (int64_t d = 0; d < d_v; ++d) values[d * attention_tile + t] = t < tile.n ? tile.value[t][d] : uint16_t(0);
}

}  // namespace
}  // namespace mla
