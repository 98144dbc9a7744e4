// The plain kernels, with products of bf16 weights as AMX's tiles make them.
#include "tiles_by_hand/kernels.h"

#include "cpu/leaf.h"
#include "cpu/linear_amx_kernels.h"

namespace mla {

const Kernels& kernels_tiles_by_hand() {
  static constexpr Kernels table = [] {
    Kernels k = make_kernels("tiles_by_hand");
    add_linear_amx(k);
    return k;
  }();
  return table;
}

}  // namespace mla
