// Sampling: each option alone against what it means, and the draw against the probabilities.
#include "model/sample.h"

#include "core/check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

namespace mla {
namespace {

const std::vector<float> logits{1.0F, 3.0F, 2.0F, 3.0F, -1.0F, 0.0F};

SamplingOptions warm(double temperature = 1) {
  SamplingOptions o;
  o.temperature = temperature;
  o.seed = 7;
  return o;
}

// How often each token comes over many positions.
std::map<int32_t, double> shares(std::span<const float> from, const SamplingOptions& o, int draws = 20000) {
  std::map<int32_t, double> out;
  for (int i = 0; i < draws; ++i) out[sample(from, {}, o, i).token] += 1.0 / draws;
  return out;
}

std::set<int32_t> tokens(const SamplingOptions& o) {
  std::set<int32_t> out;
  for (const auto& [token, share] : shares(logits, o, 3000)) out.insert(token);
  return out;
}

TEST(Sample, GreedyTakesTheLowerOfEqualIds) { EXPECT_EQ(sample(logits, {}, {}, 0).token, 1); }

TEST(Sample, DrawsFollowTheProbabilities) {
  for (double temperature : {0.5, 1.0, 2.0}) {
    double total = 0;
    for (float x : logits) total += std::exp(x / temperature);
    const auto found = shares(logits, warm(temperature));
    for (size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(logits[i] / temperature) / total;
      const auto at = found.find(int32_t(i));
      EXPECT_NEAR(at == found.end() ? 0 : at->second, p, 4 * std::sqrt(p * (1 - p) / 20000) + 1e-4) << i << " at " << temperature;
    }
  }
}

TEST(Sample, IsAFunctionOfSeedAndPosition) {
  SamplingOptions o = warm();
  int differ = 0;
  for (int position = 0; position < 200; ++position) {
    const int32_t first = sample(logits, {}, o, position).token;
    EXPECT_EQ(sample(logits, {}, o, position).token, first);
    SamplingOptions other = o;
    other.seed = 8;
    differ += sample(logits, {}, other, position).token != first;
  }
  EXPECT_GT(differ, 50);
}

TEST(Sample, TopKKeepsTheBestAndTheLowerOfEqualIds) {
  SamplingOptions o = warm(10);
  o.top_k = 1;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1}));
  o.top_k = 3;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1, 2, 3}));
  o.top_k = 100;
  EXPECT_EQ(tokens(o).size(), logits.size());
}

TEST(Sample, TopPKeepsTheFewestThatReachTheShare) {
  SamplingOptions o = warm();
  // exp: 2.72 20.1 7.39 20.1 0.37 1 of 51.7; the two best have 0.777, with the third 0.92
  o.top_p = 0.38;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1}));
  o.top_p = 0.7;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1, 3}));
  o.top_p = 0.9;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1, 2, 3}));
}

TEST(Sample, TopPOfALargeVocabularyIsThatOfAFullSort) {
  std::vector<float> many(5000);
  for (size_t i = 0; i < many.size(); ++i) many[i] = float(std::sin(double(i * i)));
  SamplingOptions o = warm();
  o.top_p = 0.5;
  std::vector<float> sorted = many;
  std::sort(sorted.rbegin(), sorted.rend());
  double total = 0, sum = 0;
  for (float x : sorted) total += std::exp(x);
  float least = 0;
  for (size_t i = 0; sum < 0.5 * total; ++i) sum += std::exp(least = sorted[i]);
  float lowest = 9;
  for (const auto& [token, share] : shares(many, o, 500)) lowest = std::min(lowest, many[size_t(token)]);
  EXPECT_GE(lowest, least - 1e-5);
  EXPECT_LT(lowest, least + 0.1);
}

TEST(Sample, MinPIsRelativeToTheBest) {
  SamplingOptions o = warm();
  o.min_p = 0.3;  // exp(-1) = 0.37, exp(-2) = 0.14
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1, 2, 3}));
  o.min_p = 1;
  EXPECT_EQ(tokens(o), (std::set<int32_t>{1, 3}));
}

TEST(Sample, RepetitionPenaltyPullsBothSignsDownOnce) {
  SamplingOptions o;
  o.repetition_penalty = 2;
  const std::vector<int32_t> history{1, 1, 1, 3};
  EXPECT_EQ(sample(logits, history, o, 0).token, 2);  // 3 → 1.5, twice or thrice seen is once penalised
  const std::vector<float> negative{-1.0F, -1.5F};
  EXPECT_EQ(sample(negative, std::vector<int32_t>{0}, o, 0).token, 1);  // -1 → -2
}

TEST(Sample, LogitBiasForcesAndForbids) {
  SamplingOptions o;
  o.logit_bias = {{4, 100.0F}};
  EXPECT_EQ(sample(logits, {}, o, 0).token, 4);
  o.logit_bias = {{1, -INFINITY}, {3, -INFINITY}};
  EXPECT_EQ(sample(logits, {}, o, 0).token, 2);
  o.temperature = 50;
  EXPECT_EQ(tokens(o).count(1) + tokens(o).count(3), 0u);
}

TEST(Sample, LogprobsAreTheModelsOwn) {
  SamplingOptions o = warm(5);
  o.top_k = 1;
  o.logit_bias = {{4, 100.0F}};
  o.logprobs = 2;
  double total = 0;
  for (float x : logits) total += std::exp(double(x));
  const Sampled s = sample(logits, {}, o, 0);
  EXPECT_EQ(s.token, 4);
  EXPECT_NEAR(s.logprob, -1 - std::log(total), 1e-6);
  ASSERT_EQ(s.alternatives.size(), 2u);
  EXPECT_EQ(s.alternatives[0].first, 1);
  EXPECT_EQ(s.alternatives[1].first, 3);
  EXPECT_NEAR(s.alternatives[0].second, 3 - std::log(total), 1e-6);
}

TEST(Sample, RefusesOptionsWithoutSense) {
  auto refused = [](auto change) {
    SamplingOptions o;
    change(o);
    try {
      sample(logits, {}, o, 0);
    } catch (const Error& error) { return error.kind() == ErrorKind::input; }
    return false;
  };
  EXPECT_TRUE(refused([](auto& o) { o.temperature = -1; }));
  EXPECT_TRUE(refused([](auto& o) { o.temperature = NAN; }));
  EXPECT_TRUE(refused([](auto& o) { o.top_k = -1; }));
  EXPECT_TRUE(refused([](auto& o) { o.top_p = 0; }));
  EXPECT_TRUE(refused([](auto& o) { o.top_p = 1.5; }));
  EXPECT_TRUE(refused([](auto& o) { o.min_p = 2; }));
  EXPECT_TRUE(refused([](auto& o) { o.repetition_penalty = 0; }));
  EXPECT_TRUE(refused([](auto& o) { o.logprobs = 21; }));
  EXPECT_TRUE(refused([](auto& o) { o.logit_bias = {{6, 1.0F}}; }));
  EXPECT_TRUE(refused([](auto& o) { o.logit_bias = {{0, NAN}}; }));
}

TEST(Sample, LogitsThatAreNotNumbersAreAnError) {
  const std::vector<float> broken{NAN, NAN};
  EXPECT_THROW(sample(broken, {}, {}, 0), Error);
  EXPECT_THROW(sample(broken, {}, warm(), 0), Error);
}

}  // namespace
}  // namespace mla
