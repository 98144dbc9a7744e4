// Products on a tile unit in plain C++, by themselves: every number of tokens, no byte read or written beyond what is theirs.
#include "core/dtype.h"
#include "core/random.h"
#include "tiles_by_hand/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace mla {
namespace {

constexpr int64_t columns = 32;  // of a unit

std::unique_ptr<uint16_t[]> random_bf16(int64_t n, uint64_t seed) {
  auto values = std::make_unique<uint16_t[]>(size_t(n));  // not a vector, whose spare room would hide what is read beyond
  for (int64_t i = 0; i < n; ++i) values[size_t(i)] = f32_to_bf16(float(random_uniform(seed, uint64_t(i)) - 0.5));
  return values;
}

// What the unit makes of a token's columns [units · 32] and a row's, in its order.
float product(const uint16_t* acts, int64_t step, const uint16_t* weights, int64_t units) {
  float sum = 0;
  for (int64_t u = 0; u < units; ++u)
    for (int k = 0; k < 16; ++k) {
      const uint16_t *a = acts + u * step + 2 * k, *w = weights + u * 16 * columns + k * columns;
      sum += bf16_to_f32(a[0]) * bf16_to_f32(w[0]) + bf16_to_f32(a[1]) * bf16_to_f32(w[1]);
    }
  return sum;
}

TEST(Tiles, MultiplyEveryNumberOfTokens) {
  for (int n = 1; n <= 130; ++n) {
    const int64_t units = n % 3 == 0 ? 19 : n % 3 == 1 ? 8 : 3, groups = 1 + n % 4, stride = (groups | 1) * lanes;
    const auto weights = random_bf16(groups * units * 16 * columns, 1), acts = random_bf16(n * units * columns, 2);
    const int64_t floats = (n - 1) * stride + groups * lanes;
    const auto out = std::make_unique<float[]>(size_t(floats));
    std::fill_n(out.get(), floats, std::numeric_limits<float>::quiet_NaN());
    kernels_tiles_by_hand().product[int(DType::bf16)]({reinterpret_cast<const std::byte*>(weights.get()), units * 1024, groups,
                                                       reinterpret_cast<const std::byte*>(acts.get()), n, units, n % 2 == 0, nullptr,
                                                       out.get(), stride});
    for (int i = 0; i < n; ++i) {
      const int64_t first = i / 32 * 32, tokens = std::min<int64_t>(32, n - first);
      const uint16_t* own = acts.get() + first * units * columns + (i - first) * columns;
      for (int64_t c = 0; c < stride && i * stride + c < floats; ++c) {
        const float got = out[size_t(i * stride + c)];
        if (c >= groups * lanes) {
          ASSERT_TRUE(std::isnan(got)) << "beyond the rows of token " << i << " of " << n;
          continue;
        }
        const uint16_t* row = weights.get() + c / lanes * units * 16 * columns + c % lanes * 2;
        ASSERT_EQ(got, product(own, tokens * columns, row, units)) << "row " << c << " of token " << i << " of " << n;
      }
    }
  }
}

}  // namespace
}  // namespace mla
