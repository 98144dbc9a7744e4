// The kernels for AVX2 with FMA and F16C.
#include "cpu/leaf.h"

namespace mla {

const Kernels& kernels_avx2() {
  static constexpr Kernels table = make_kernels("avx2");
  return table;
}

}  // namespace mla
