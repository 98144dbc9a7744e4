// The refit of W_Q: it finds queries that are there to be found, and what it says of the error is so.
#include "lowrank/score_refit.h"

#include "core/threads.h"
#include "random.h"

#include <gtest/gtest.h>

#include <cmath>

namespace mla::test {
namespace {

constexpr int64_t T = 24, d = 6, d_R = 4, heads = 2, D = 10;

std::vector<float> narrow(const Matrix& m) { return {m.data.begin(), m.data.end()}; }

struct Case {
  ScoreShape shape{{heads, 1, d, D, false}, T, d_R, 0.5F, 0.4F, {1.0, 0.1}};
  Matrix truth = random_matrix(heads * (d + d_R), D, 1), inputs = Matrix(D, D);
  std::vector<ScoreWindow> windows;

  // The original's scores are those of `truth` against the converted keys: q' k is handed over as one key of width d.
  Case() {
    for (uint64_t n = 0; n < 6; ++n) {
      const Matrix a = random_matrix(T, D, 10 + n), still = random_matrix(T * heads, d, 20 + n), rotary = random_matrix(T, d_R, 30 + n);
      ScoreWindow w{narrow(a), {}, std::vector<float>(T * d), narrow(still), narrow(rotary)};
      w.query.resize(T * heads * d);
      windows.push_back(std::move(w));
      for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < D; ++i)
          for (int64_t j = 0; j < D; ++j) inputs(i, j) += a(t, i) * a(t, j) / double(6 * T);
    }
  }

  // The score of a query of head `head` at t against the key at s, by definition.
  double score(const Matrix& q, const ScoreWindow& w, int64_t head, int64_t t, int64_t s) const {
    std::vector<double> row;
    for (int64_t i = 0; i < d + d_R; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < D; ++j) sum += q(head * (d + d_R) + i, j) * double(w.inputs[size_t(t * D + j)]);
      row.push_back(sum);
    }
    double out = 0;
    for (int64_t i = 0; i < d; ++i) out += row[size_t(i)] * double(w.still[size_t((s * heads + head) * d + i)]);
    for (int64_t p = 0; p < d_R / 2; ++p) {
      const auto turned = std::complex<double>(row[size_t(d + 2 * p)], row[size_t(d + 2 * p + 1)]) *
                          std::polar(1.0, shape.frequencies[size_t(p)] * double(t));
      out += turned.real() * double(w.rotary[size_t(s * d_R + 2 * p)]) + turned.imag() * double(w.rotary[size_t(s * d_R + 2 * p + 1)]);
    }
    return out * double(shape.fitted_scale);
  }
};

// Σ P (score − original's, less its mean)² with P the mean of both attentions; the original's scores are 0, so its attention is even.
double error(const Case& c, const Matrix& q) {
  double sum = 0;
  for (const ScoreWindow& w : c.windows)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t t = 0; t < T; ++t) {
        std::vector<double> scores, p;
        double whole = 0, mean = 0;
        for (int64_t s = 0; s <= t; ++s) scores.push_back(c.score(q, w, head, t, s)), whole += std::exp(scores.back());
        for (double x : scores) p.push_back((std::exp(x) / whole + 1 / double(t + 1)) / 2);
        for (size_t s = 0; s < p.size(); ++s) mean += p[s] * scores[s];
        for (size_t s = 0; s < p.size(); ++s) sum += p[s] * std::pow(scores[s] - mean, 2);
      }
  return sum;
}

TEST(RefitQueries, LowersTheErrorAndSaysByHowMuch) {
  Case c;
  Threads threads(2);
  Matrix q = c.truth;
  for (double& x : q.data) x *= 0.3;
  const double before = error(c, q);
  Matrix once = q, more = q;
  const double said = refit_queries(once, c.windows, c.shape, c.inputs, 1, threads);
  EXPECT_LT(said, 0.5);
  EXPECT_NEAR(error(c, once) / before, said, 0.15);  // P changes with the queries
  refit_queries(more, c.windows, c.shape, c.inputs, 6, threads);
  EXPECT_LT(error(c, more), 0.01 * before);  // queries of 0 fit scores of 0
}

// A first key far larger than all others, as attention sinks have: the covariance under attention is what little the sums differ by.
TEST(RefitQueries, StandsKeysThatDwarfTheOthers) {
  Case c;
  Threads threads(2);
  for (ScoreWindow& w : c.windows)
    for (int64_t i = 0; i < heads * d; ++i) w.still[size_t(i)] = 3e4F * (i % 2 ? 1.0F : -1.0F);
  Matrix q = c.truth;
  for (double& x : q.data) x *= 0.3;
  const double said = refit_queries(q, c.windows, c.shape, c.inputs, 3, threads);
  EXPECT_TRUE(std::isfinite(said));
  check_finite(q, "W_Q");
}

TEST(RefitQueries, LeavesWhatFitsAlone) {
  Case c;
  Threads threads(2);
  Matrix q(heads * (d + d_R), D);
  EXPECT_EQ(refit_queries(q, c.windows, c.shape, c.inputs, 2, threads), 0);
  EXPECT_EQ(frobenius_norm(q), 0);
}

}  // namespace
}  // namespace mla::test
