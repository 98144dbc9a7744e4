// The plain kernels, with attention and products of bf16 weights as AMX's tiles make them.
#include "tiles_by_hand/kernels.h"

#include "cpu/attention_amx_kernels.h"
#include "cpu/leaf.h"
#include "cpu/linear_amx_kernels.h"

namespace mla {
namespace {

void attend_on_tiles(const AttentionUnit& u) { (fits_tiles(u.kv->format) ? attend_lanes_amx : attend_lanes)(u); }

}  // namespace

const Kernels& kernels_tiles_by_hand() {
  static constexpr Kernels table = [] {
    Kernels k = make_kernels("tiles_by_hand");
    add_linear_amx(k);
    k.attention.lanes = attend_on_tiles;
    return k;
  }();
  return table;
}

}  // namespace mla
