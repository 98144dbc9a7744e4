// The kernels for AVX-512 with VNNI; attention and products with bf16 weights on the tiles of AMX, as in Sapphire Rapids.
#include "cpu/leaf.h"

namespace mla {

const Kernels& kernels_avx512_amx() {
  static constexpr Kernels table = make_kernels("avx512_amx");
  return table;
}

}  // namespace mla
