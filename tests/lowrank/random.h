// Random matrices for the tests of this room.
#pragma once

#include "core/random.h"
#include "lowrank/matrix.h"

namespace mla::test {

inline Matrix random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  Matrix a(rows, cols);
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] = random_normal(seed, i);
  return a;
}

// E[x xᵀ] of `samples` inputs: singular when they are fewer than n.
inline Matrix covariance(int64_t n, int64_t samples, uint64_t seed) {
  const Matrix x = random_matrix(samples, n, seed);
  return multiply(x, x, Transposed::left);
}

}  // namespace mla::test
