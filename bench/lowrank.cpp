// The four factorisations of a 4096 × 4096 matrix with a decaying spectrum at rank 256, beside a full SVD by LAPACK's dgesdd.
#include "core/random.h"
#include "lowrank/factor.h"

#include <fmt/core.h>

#include <chrono>
#include <cmath>
#include <cstdlib>

using namespace mla;

namespace {

double seconds_of(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Matrix gaussian(int64_t rows, int64_t cols, uint64_t seed) {
  Matrix a(rows, cols);
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] = random_normal(seed, i);
  return a;
}

// Singular values 1/(1 + i/16): a slow decay, as weights have.
Matrix decaying(int64_t n) {
  Matrix u = orthonormal_columns(gaussian(n, n, 1));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) u(i, j) /= 1 + double(j) / 16;
  return multiply(u, orthonormal_columns(gaussian(n, n, 2)), Transposed::right);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t n = argc > 1 ? std::atoll(argv[1]) : 4096, rank = argc > 2 ? std::atoll(argv[2]) : 256;
  const Matrix w = decaying(n);
  double full_seconds = 0, least = 0;
  for (Method method : {Method::svd, Method::rsvd, Method::qr, Method::cur}) {
    LowRank f;
    const double seconds = seconds_of([&] { f = factor(method, w, rank); });
    const double error = weighted_error(w, f);
    if (method == Method::svd) full_seconds = seconds, least = error;
    fmt::print("{:4}  {:8.2f} s  {:6.1f} x as fast as the SVD  error {:.4f}  {:.4f} of the least\n", name(method), seconds,
               full_seconds / seconds, error, error / least);
    std::fflush(stdout);
  }
}
