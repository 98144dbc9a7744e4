// The kernels for plain C++.
#include "cpu/leaf.h"

namespace mla {

const Kernels& kernels_plain() {
  static constexpr Kernels table = make_kernels("plain");
  return table;
}

}  // namespace mla
