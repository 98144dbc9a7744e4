// What the tests of attention on the GPU hold results against.
#pragma once

#include "attention_ref.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace mla {

// Outputs within `tolerance` of their size all told and a tenth of it each, and the logs of the sums to a thousandth.
inline void expect_close(const ref::Result& expected, const std::vector<float>& got, const std::vector<float>& sums, double tolerance) {
  double square = 0, worst = 0, error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double off = std::fabs(double(got[i]) - expected.o[i]);
    ASSERT_FALSE(std::isnan(off)) << "element " << i << " of " << got.size();
    worst = std::max(worst, off), error += off * off, square += expected.o[i] * expected.o[i];
  }
  EXPECT_LT(std::sqrt(error / square), tolerance);
  EXPECT_LT(worst / std::sqrt(square / double(got.size())), 0.1);
  for (size_t i = 0; i < sums.size(); ++i) {
    if (std::isinf(expected.lse[i]))
      EXPECT_EQ(sums[i], -INFINITY) << i;
    else
      EXPECT_NEAR(sums[i], expected.lse[i], 1e-3 * (1 + std::fabs(expected.lse[i]))) << i;
  }
}

}  // namespace mla
