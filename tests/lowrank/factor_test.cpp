// Every method against its error bound, on matrices of all shapes and ranks, with and without weights, and on input nobody can factorise.
#include "lowrank/factor.h"
#include "core/check.h"
#include "random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

namespace mla::test {
namespace {

// Singular values decay^i.
Matrix decaying(int64_t rows, int64_t cols, double decay, uint64_t seed) {
  const int64_t k = std::min(rows, cols);
  Matrix u = orthonormal_columns(random_matrix(rows, k, seed));
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < rows; ++i) u(i, j) *= std::pow(decay, double(j));
  return multiply(u, orthonormal_columns(random_matrix(cols, k, seed + 1)), Transposed::right);
}

Matrix of_rank(int64_t rows, int64_t cols, int64_t rank, uint64_t seed) {
  return multiply(random_matrix(rows, rank, seed), random_matrix(rank, cols, seed + 1));
}

double tail(const std::vector<double>& s, int64_t rank) {
  double sum = 0;
  for (size_t i = size_t(rank); i < s.size(); ++i) sum += s[i] * s[i];
  return std::sqrt(sum);
}

double spectral_norm(const Matrix& a) { return svd(a).s[0]; }

struct Shape {
  int64_t rows, cols, rank;
};
const Shape shapes[] = {{1, 1, 1}, {1, 9, 1}, {9, 1, 1}, {17, 17, 5}, {40, 13, 4}, {13, 40, 4}, {31, 33, 31}};

TEST(Factor, SvdHasTheLeastErrorAndOthersNoLess) {
  for (const Shape& s : shapes) {
    const Matrix w = decaying(s.rows, s.cols, 0.8, 1);
    const std::vector<double> sigma = svd(w).s;
    const double least = tail(sigma, s.rank);
    for (Method method : all_methods) {
      const double error = weighted_error(w, factor(method, w, s.rank));
      EXPECT_GE(error, least * (1 - 1e-9) - 1e-12) << name(method) << " " << s.rows << "x" << s.cols;
      if (method == Method::svd) { EXPECT_NEAR(error, least, 1e-12) << s.rows << "x" << s.cols; }
    }
    if (s.rank < std::min(s.rows, s.cols)) {
      const Matrix rest = difference(w, product(factor(Method::svd, w, s.rank)));
      EXPECT_NEAR(spectral_norm(rest), sigma[size_t(s.rank)], 1e-12);
    }
  }
}

TEST(Factor, EckartYoungHoldsInTheWeightedNorm) {
  for (int64_t samples : {9, 200}) {  // a singular covariance and a regular one
    const Matrix w = random_matrix(21, 30, 3), c = covariance(30, samples, 4), s = covariance(21, 60, 5);
    const Matrix a = multiply(multiply(s, w), symmetric_power(c, 0.5));
    const std::vector<double> sigma = svd(a).s;
    for (int64_t rank : {1, 5, 8}) {
      const double least = tail(sigma, rank);
      EXPECT_NEAR(weighted_error(w, factor(Method::svd, w, rank, &c, &s), &c, &s), least, 1e-6 * sigma[0]);
      for (Method method : all_methods)
        EXPECT_GE(weighted_error(w, factor(method, w, rank, &c, &s), &c, &s), least - 1e-6 * sigma[0]) << name(method);
      // Without the weights, the weighted error is larger.
      EXPECT_GT(weighted_error(w, factor(Method::svd, w, rank), &c, &s), least * 1.01);
    }
  }
}

TEST(Factor, FullRankIsExactWhateverTheWeights) {
  for (const Shape& s : shapes) {
    const int64_t full = std::min(s.rows, s.cols);
    const Matrix w = random_matrix(s.rows, s.cols, 7), c = covariance(s.cols, 3 * s.cols, 8), m = covariance(s.rows, 3 * s.rows, 9);
    for (Method method : all_methods) {
      EXPECT_LE(frobenius_norm(difference(w, product(factor(method, w, full)))), 1e-9 * frobenius_norm(w)) << name(method);
      EXPECT_LE(frobenius_norm(difference(w, product(factor(method, w, full, &c, &m)))), 1e-6 * frobenius_norm(w)) << name(method);
    }
  }
}

TEST(Factor, ARankDeficientMatrixIsExactAtItsRank) {
  const Matrix w = of_rank(24, 35, 6, 11), c = covariance(35, 50, 12);
  for (Method method : all_methods)
    for (int64_t rank : {6, 7, 20}) {
      EXPECT_LE(frobenius_norm(difference(w, product(factor(method, w, rank)))), 1e-7 * frobenius_norm(w)) << name(method) << " " << rank;
      EXPECT_LE(frobenius_norm(difference(w, product(factor(method, w, rank, &c)))), 1e-6 * frobenius_norm(w)) << name(method) << rank;
    }
}

TEST(Factor, ZeroesAreTheirOwnFactorisation) {
  const Matrix zero(5, 8), c(8, 8), s(5, 5);
  for (Method method : all_methods) {
    EXPECT_EQ(frobenius_norm(product(factor(method, zero, 3))), 0) << name(method);
    const LowRank f = factor(method, random_matrix(5, 8, 1), 3, &c, &s);  // weights that see nothing
    for (double x : f.up.data) EXPECT_TRUE(std::isfinite(x)) << name(method);
  }
}

TEST(Factor, RandomSvdKeepsItsExpectedBound) {
  for (const auto& [decay, slack] : {std::pair(0.9, 1.05), {0.99, 1.1}}) {
    const Matrix w = decaying(120, 150, decay, 13);
    const std::vector<double> sigma = svd(w).s;
    const int64_t rank = 20;
    FactorOptions o;
    for (o.power_iterations = 0; o.power_iterations < 4; ++o.power_iterations) {
      const double error = weighted_error(w, factor(Method::rsvd, w, rank, nullptr, nullptr, o));
      // Q's bound and the cut to r columns: √(1 + r/(p−1)) + 1 times the optimum; here far below with two iterations.
      EXPECT_LE(error, (std::sqrt(1 + double(rank) / (o.oversampling - 1)) + 1) * tail(sigma, rank));
      if (o.power_iterations >= 2) { EXPECT_LE(error, slack * tail(sigma, rank)) << decay << " " << o.power_iterations; }
    }
    // ‖A − up down‖ is ‖A − QQᵀA‖: what is kept is a projection.
    const LowRank f = factor(Method::rsvd, w, rank);
    EXPECT_NEAR(weighted_error(w, f), frobenius_norm(difference(w, multiply(f.up, multiply(f.up, w, Transposed::left)))), 1e-10);
    EXPECT_LE(frobenius_norm(difference(multiply(f.up, f.up, Transposed::left), identity(rank))), 1e-10);
  }
}

TEST(Factor, RandomSvdFollowsItsSeed) {
  const Matrix w = random_matrix(40, 50, 15);
  FactorOptions one, two;
  two.seed = 1;
  EXPECT_EQ(factor(Method::rsvd, w, 7, nullptr, nullptr, one).up.data, factor(Method::rsvd, w, 7, nullptr, nullptr, one).up.data);
  EXPECT_NE(factor(Method::rsvd, w, 7, nullptr, nullptr, one).up.data, factor(Method::rsvd, w, 7, nullptr, nullptr, two).up.data);
}

TEST(Factor, QrKeepsRowsAndItsErrorIsTheTrailingBlock) {
  const Matrix w = decaying(30, 26, 0.7, 17);
  const Matrix r = pivoted_qr(transpose(w)).r;
  for (int64_t rank : {1, 6, 15}) {
    const LowRank f = factor(Method::qr, w, rank);
    EXPECT_EQ(f.down.data, take_rows(w, f.rows).data);
    double trailing = 0;
    for (int64_t i = rank; i < r.rows; ++i)
      for (int64_t j = i; j < r.cols; ++j) trailing += r(i, j) * r(i, j);
    const Matrix rest = difference(w, product(f));
    EXPECT_NEAR(frobenius_norm(rest), std::sqrt(trailing), 1e-10);
    EXPECT_LE(spectral_norm(rest), std::exp2(double(rank)) * std::sqrt(1.0 + double(rank * (30 - rank))) * svd(w).s[size_t(rank)]);
  }
}

TEST(Factor, CurKeepsRowsAndColumnsWithinTheBoundOfDeim) {
  const Matrix w = decaying(30, 26, 0.7, 19);
  const Svd d = svd(w);
  for (int64_t rank : {1, 6, 15}) {
    const LowRank f = factor(Method::cur, w, rank);
    EXPECT_EQ(f.down.data, take_rows(w, f.rows).data);
    const auto spread = [&](const Matrix& vectors, const std::vector<int64_t>& chosen) {
      return 1 / svd(take_rows(first_columns(vectors, rank), chosen)).s.back();
    };
    const double bound = (spread(d.u, f.rows) + spread(transpose(d.vt), f.columns)) * d.s[size_t(rank)];
    EXPECT_LE(spectral_norm(difference(w, product(f))), bound * (1 + 1e-9)) << rank;
    // up's columns are combinations of the chosen columns of w.
    const Matrix columns = take_columns(w, f.columns);
    const Matrix projected = multiply(columns, multiply(pseudo_inverse(columns, 1e12), f.up));
    EXPECT_LE(frobenius_norm(difference(projected, f.up)), 1e-7 * frobenius_norm(f.up));
  }
}

TEST(Factor, ThePseudoInverseCapsItsCondition) {
  Matrix a(3, 2);
  a(0, 0) = 1, a(1, 1) = 1e-6;
  EXPECT_NEAR(pseudo_inverse(a, 1e8)(1, 1), 1e6, 1e-3);
  EXPECT_EQ(pseudo_inverse(a, 1e3)(1, 1), 0);
}

void expect_refused(const std::function<void()>& work, const char* said) {
  try {
    work();
    FAIL() << "not refused: " << said;
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_NE(std::string(e.what()).find(said), std::string::npos) << e.what();
  }
}

TEST(Factor, RefusesWhatCannotBeFactorised) {
  Matrix w = random_matrix(4, 6, 21), c(5, 5), s(3, 3);
  for (Method method : all_methods) {
    expect_refused([&] { factor(method, w, 0); }, "rank 0");
    expect_refused([&] { factor(method, w, 5); }, "give 1 to 4");
    expect_refused([&] { factor(method, Matrix(0, 3), 1); }, "[0, 3]");
    expect_refused([&] { factor(method, w, 2, &c); }, "covariance is [5, 5]");
    expect_refused([&] { factor(method, w, 2, nullptr, &s); }, "metric is [3, 3]");
    for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      Matrix broken = w;
      broken(2, 3) = bad;
      expect_refused([&] { factor(method, broken, 2); }, "at [2, 3]");
    }
  }
}

// Debian 12's OpenBLAS takes an Emerald Rapids for a Prescott.
TEST(Math, OldKernelsGiveWayToWhatTheProcessorHas) {
  EXPECT_EQ(better_core("Prescott", true, true), "SkylakeX");
  EXPECT_EQ(better_core("Nehalem", true, false), "Haswell");
  EXPECT_EQ(better_core("Prescott", false, false), "");
  for (const char* good : {"Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids"}) EXPECT_EQ(better_core(good, true, true), "");
}

}  // namespace
}  // namespace mla::test
