// The fit of a converted attention: its error and gradient against attention written out in double, and what its steps are for.
#include "lowrank/attention_fit.h"

#include "core/threads.h"
#include "random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <numeric>

namespace mla::test {
namespace {

// Products of more than one block of rows, a W_Q that Adam takes in more than one.
constexpr int64_t d = 6, d_R = 4, heads = 10, D = 170, r = 5, stream = 110;

using Weights = std::array<std::vector<double>, 6>;  // as FitWeights::all

struct Case {
  FitShape shape;
  MlaMatrices start;
  std::vector<float> inputs, target, weight;

  explicit Case(int64_t T) : shape{{heads, 1, d, D, false}, T, r, d_R, stream, 0.002F, {1.0, 0.1}} {
    start.q = random_matrix(heads * (d + d_R), D, 1), start.kv_a = random_matrix(r + d_R, D, 2);
    start.kv_b = random_matrix(heads * 2 * d, r, 3), start.o = random_matrix(stream, heads * d, 4);
    const Matrix a = random_matrix(T, D, 5), y = random_matrix(T, stream, 6);
    inputs.assign(a.data.begin(), a.data.end()), target.assign(y.data.begin(), y.data.end());
    for (int64_t t = 0; t < T; ++t) weight.push_back(0.5F + float(t % 3));
  }
  FitWindow window() const { return {inputs.data(), target.data(), weight.data()}; }

  // Σ w ‖target − output‖² by definition.
  double error(const Weights& w) const {
    const auto& [q, down, rotary, uk, uv, o] = w;
    const int64_t T = shape.window;
    const auto rows = [](const std::vector<double>& m, int64_t from, int64_t n, const std::vector<double>& x) {
      std::vector<double> out(size_t(n), 0);
      for (size_t i = 0; i < out.size(); ++i)
        for (size_t j = 0; j < x.size(); ++j) out[i] += m[(size_t(from) + i) * x.size() + j] * x[j];
      return out;
    };
    std::vector<std::vector<double>> a, latents, turning;
    for (int64_t t = 0; t < T; ++t) {
      a.emplace_back(inputs.begin() + t * D, inputs.begin() + (t + 1) * D);
      latents.push_back(rows(down, 0, r, a.back())), turning.push_back(rows(rotary, 0, d_R, a.back()));
    }
    double whole = 0;
    for (int64_t t = 0; t < T; ++t) {
      std::vector<double> attended;
      for (int64_t h = 0; h < heads; ++h) {
        const std::vector<double> query = rows(q, h * (d + d_R), d + d_R, a[size_t(t)]);
        std::vector<double> out(d, 0);
        double sum = 0;
        for (int64_t s = 0; s <= t; ++s) {
          const std::vector<double> key = rows(uk, h * d, d, latents[size_t(s)]), value = rows(uv, h * d, d, latents[size_t(s)]);
          double score = std::inner_product(key.begin(), key.end(), query.begin(), 0.0);
          for (int64_t f = 0; f < d_R / 2; ++f) {
            const std::complex<double> asked(query[size_t(d + 2 * f)], query[size_t(d + 2 * f + 1)]);
            const std::complex<double> found(turning[size_t(s)][size_t(2 * f)], turning[size_t(s)][size_t(2 * f + 1)]);
            score += (std::conj(asked * std::polar(1.0, shape.frequencies[size_t(f)] * double(t - s))) * found).real();
          }
          const double p = std::exp(score * double(shape.scale));
          sum += p;
          for (size_t i = 0; i < out.size(); ++i) out[i] += p * value[i];
        }
        for (double x : out) attended.push_back(x / sum);
      }
      const std::vector<double> output = rows(o, 0, stream, attended);
      for (size_t i = 0; i < output.size(); ++i)
        whole += double(weight[size_t(t)]) * std::pow(double(target[size_t(t) * stream + i]) - output[i], 2);
    }
    return whole;
  }
};

Weights widened(FitWeights& w) {
  Weights out;
  for (size_t k = 0; k < out.size(); ++k) out[k].assign(w.all()[k]->begin(), w.all()[k]->end());
  return out;
}

TEST(AttentionFit, ErrorAndGradientAreThoseOfAttentionWrittenOut) {
  Threads threads(2);
  for (int64_t T : {1, 7, 131}) {  // one tile and two
    Case c(T);
    AttentionFit fit(c.shape, c.start, threads);
    for (std::vector<float>* g : fit.gradient().all()) std::ranges::fill(*g, std::nanf(""));
    const double error = fit.differentiate(c.window()), wanted = c.error(widened(fit.weights()));
    EXPECT_NEAR(error / wanted, 1, 1e-4) << T;
    for (size_t k = 0; k < 6; ++k) {  // along a random direction of each matrix
      const std::vector<float>& g = *fit.gradient().all()[k];
      const Matrix direction = random_matrix(1, int64_t(g.size()), 40 + k);
      const auto moved = [&](double by) {
        Weights w = widened(fit.weights());
        for (size_t i = 0; i < w[k].size(); ++i) w[k][i] += by * direction.data[i];
        return c.error(w);
      };
      double slope = 0, steep = 0;
      for (size_t i = 0; i < g.size(); ++i) slope += double(g[i]) * direction.data[i], steep += double(g[i]) * double(g[i]);
      EXPECT_NEAR(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, 1e-3 * std::sqrt(steep) + 1e-6 * wanted) << T << " matrix " << k;
    }
  }
}

TEST(AttentionFit, StepsLowerTheErrorAndThreadsDoNotChangeThem) {
  Case c(140);
  MlaMatrices first;
  for (int threads : {1, 3}) {
    Threads pool(threads);
    set_math_threads(1);
    AttentionFit fit(c.shape, c.start, pool);
    const double before = fit.error(c.window());
    for (int step = 0; step < 60; ++step) fit.move(0.02), fit.differentiate(c.window());
    EXPECT_LT(fit.differentiate(c.window()), 0.2 * before);
    MlaMatrices m = c.start;
    fit.put(m);
    if (threads == 1) first = m;
    for (Matrix MlaMatrices::*part : {&MlaMatrices::q, &MlaMatrices::kv_a, &MlaMatrices::kv_b, &MlaMatrices::o})
      EXPECT_EQ((first.*part).data, (m.*part).data);
    EXPECT_NEAR(c.error(widened(fit.weights())) / fit.differentiate(c.window()), 1, 1e-3);
  }
}

TEST(AttentionFit, PutsWeightsWhereTheyCameFrom) {
  Case c(4);
  Threads threads(1);
  MlaMatrices m = c.start;
  for (Matrix* part : {&m.q, &m.kv_a, &m.kv_b, &m.o}) std::ranges::fill(part->data, std::nan(""));
  AttentionFit(c.shape, c.start, threads).put(m);
  for (Matrix MlaMatrices::*part : {&MlaMatrices::q, &MlaMatrices::kv_a, &MlaMatrices::kv_b, &MlaMatrices::o})
    for (size_t i = 0; i < (m.*part).data.size(); ++i) EXPECT_EQ((m.*part).data[i], double(float((c.start.*part).data[i])));
}

}  // namespace
}  // namespace mla::test
