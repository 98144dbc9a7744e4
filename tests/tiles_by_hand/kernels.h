// The plain kernels with attention and products on a tile unit in plain C++.
#pragma once

#include "cpu/kernels.h"

namespace mla {

const Kernels& kernels_tiles_by_hand();

}  // namespace mla
