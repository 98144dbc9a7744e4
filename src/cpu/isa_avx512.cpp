// The kernels for AVX-512 with VNNI, as from Ice Lake on.
#include "cpu/leaf.h"

namespace mla {

const Kernels& kernels_avx512() {
  static constexpr Kernels table = make_kernels("avx512");
  return table;
}

}  // namespace mla
