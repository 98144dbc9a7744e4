// The kernels for AVX-512 with VNNI and BF16, as in Zen 4, Zen 5 and Sapphire Rapids.
#include "cpu/leaf.h"

namespace mla {

const Kernels& kernels_avx512_bf16() {
  static constexpr Kernels table = make_kernels("avx512_bf16");
  return table;
}

}  // namespace mla
