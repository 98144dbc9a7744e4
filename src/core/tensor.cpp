// Shapes in words.
#include "core/tensor.h"

#include <fmt/core.h>

namespace mla {

std::string describe(const Tensor& t) {
  std::string text = fmt::format("{} [", info(t.dtype).name);
  for (int i = 0; i < t.rank; ++i) text += fmt::format("{}{}", i ? ", " : "", t.shape[i]);
  return text + "]";
}

}  // namespace mla
