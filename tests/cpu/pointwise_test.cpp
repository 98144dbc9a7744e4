// Norms, rotation and routing on every device of this machine, against double precision.
#include "machines.h"
#include "ref.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>

namespace mla {
namespace {

class PointwiseTest : public testing::TestWithParam<Machine> {};

TEST_P(PointwiseTest, rms_norm) {
  const auto device = GetParam().open(2);
  for (int64_t d : {1, 15, 16, 24, 576, 2048})
    for (int64_t n : {1, 3, 40}) {
      auto x = ref::random_floats(n * (d + 5), 1, 3), weight = ref::random_floats(d, 2);
      std::vector<float> y(size_t(n * d), nan);
      Tensor in = view(x.data(), DType::f32, {n, d}), w = view(weight.data(), DType::f32, {d});
      in.stride[0] = d + 5;
      device->rms_norm(in, w, 1e-6f, view(y.data(), DType::f32, {n, d}));
      for (int64_t i = 0; i < n; ++i) {
        const ref::Row row(x.begin() + i * (d + 5), x.begin() + i * (d + 5) + d);
        EXPECT_LT(ref::relative_error(y.data() + i * d, ref::rms_norm(row, {weight.begin(), weight.end()}, 1e-6)), 2e-6) << d;
      }
      device->rms_norm(in, w, 1e-6f, in);  // in place
      for (int64_t i = 0; i < n * d; ++i) ASSERT_EQ(x[size_t(i / d * (d + 5) + i % d)], y[size_t(i)]);
    }
}

TEST_P(PointwiseTest, rope) {
  const auto device = GetParam().open(2);
  for (int64_t d : {2, 6, 64, 128})
    for (int64_t n : {1, 70})
      for (const bool interleaved : {false, true}) {
        const int64_t heads = 3, pitch = d + 7;
        auto x = ref::random_floats(n * heads * pitch, 3);
        const auto before = x, angle = ref::random_floats(n * d / 2, 4, 10);
        std::vector<float> cos_sin;
        for (float a : angle) cos_sin.push_back(float(std::cos(double(a)))), cos_sin.push_back(float(std::sin(double(a))));
        Tensor t = view(x.data(), DType::f32, {n, heads, d});
        t.stride[0] = heads * pitch, t.stride[1] = pitch;
        device->rope(t, view(cos_sin.data(), DType::f32, {n, d / 2, 2}), interleaved);
        for (int64_t i = 0; i < n * heads; ++i) {
          const ref::Row row(before.begin() + i * pitch, before.begin() + i * pitch + d);
          const ref::Row angles(angle.begin() + i / heads * (d / 2), angle.begin() + (i / heads + 1) * (d / 2));
          EXPECT_LT(ref::relative_error(x.data() + i * pitch, ref::rope(row, angles, interleaved)), 1e-6);
          for (int64_t j = d; j < pitch; ++j) ASSERT_EQ(x[size_t(i * pitch + j)], before[size_t(i * pitch + j)]);
        }
      }
}

TEST_P(PointwiseTest, route) {
  const auto device = GetParam().open(2);
  for (const auto& [experts, groups, top_groups, k] :
       {std::array{8, 1, 1, 2}, std::array{64, 1, 1, 6}, std::array{160, 8, 3, 6}, std::array{5, 1, 1, 1}})
    for (const bool renormalise : {false, true}) {
      const int64_t n = 37;
      RouterConfig c;
      c.gating = groups > 1 ? Gating::group_limited_greedy : Gating::greedy;
      c.experts = experts, c.top_k = k, c.groups = groups, c.top_groups = top_groups, c.renormalise = renormalise, c.scale = 16;
      auto logits = ref::random_floats(n * experts, 5, 2);
      std::vector<int32_t> expert(size_t(n * k), -1);
      std::vector<float> weight(size_t(n * k), nan);
      device->route(view(logits.data(), DType::f32, {n, experts}), c,
                    {view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})});
      const ref::Matrix rows = ref::to_double(logits.data(), n, experts, experts);
      for (int64_t i = 0; i < n; ++i) {
        const ref::Route r = ref::route(rows[size_t(i)], c);
        EXPECT_EQ(r.expert, std::vector<int>(expert.begin() + i * k, expert.begin() + (i + 1) * k));
        EXPECT_LT(ref::relative_error(weight.data() + i * k, r.weight), 1e-5);
      }
    }
}

TEST_P(PointwiseTest, gate) {
  const auto device = GetParam().open(2);
  for (const auto& [experts, groups, top_groups, k, d] :
       {std::array{8, 1, 1, 2, 24}, std::array{64, 1, 1, 6, 2048}, std::array{160, 8, 3, 6, 5120}, std::array{5, 1, 1, 1, 77}})
    for (const int64_t n : {1, 3, 40}) {
      RouterConfig c;
      c.gating = groups > 1 ? Gating::group_limited_greedy : Gating::greedy;
      c.experts = experts, c.top_k = k, c.groups = groups, c.top_groups = top_groups;
      const int64_t pitch = d + 5;
      auto x = ref::random_floats(n * pitch, 6, 3), norm = ref::random_floats(d, 7), w = ref::random_floats(int64_t(experts) * d, 8, 0.05);
      std::vector<float> h(size_t(n * d), nan), weight(size_t(n * k), h[0]), scores(size_t(n * experts), h[0]);
      std::vector<int32_t> expert(size_t(n * k), -1);
      const Weight router = device->pack(view(w.data(), DType::f32, {experts, d}));
      Tensor in = view(x.data(), DType::f32, {n, d});
      in.stride[0] = pitch;
      device->gate(in, view(norm.data(), DType::f32, {d}), 1e-6F, view(h.data(), DType::f32, {n, d}), router, c,
                   view(scores.data(), DType::f32, {n, experts}),
                   {view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})}, {});
      const ref::Matrix matrix = ref::to_double(w.data(), experts, d, d);
      for (int64_t i = 0; i < n; ++i) {
        const ref::Row normed = ref::rms_norm({x.begin() + i * pitch, x.begin() + i * pitch + d}, {norm.begin(), norm.end()}, 1e-6);
        EXPECT_LT(ref::relative_error(h.data() + i * d, normed), 2e-6) << d;
        EXPECT_LT(ref::relative_error(scores.data() + i * experts, ref::product(matrix, normed)), 1e-5) << d;
        // From the scores that were given: where two are close, which is ahead is a matter of rounding.
        const ref::Route r = ref::route({scores.begin() + i * experts, scores.begin() + (i + 1) * experts}, c);
        EXPECT_EQ(r.expert, std::vector<int>(expert.begin() + i * k, expert.begin() + (i + 1) * k));
        EXPECT_LT(ref::relative_error(weight.data() + i * k, r.weight), 1e-5);
      }
    }
}

// Scores that are no numbers, of whichever bits, route anywhere, and the other tokens where they would go.
TEST_P(PointwiseTest, a_gate_of_no_numbers_ends) {
  const auto device = GetParam().open(2);
  const int64_t n = 3, d = 64, experts = 64, k = 6;
  RouterConfig c;
  c.experts = experts, c.top_k = k;
  auto x = ref::random_floats(n * d, 9), norm = ref::random_floats(d, 10), w = ref::random_floats(experts * d, 11);
  const Weight router = device->pack(view(w.data(), DType::f32, {experts, d}));
  auto chosen = [&](float first) {
    x[size_t(d)] = first;
    std::vector<float> h(size_t(n * d)), weight(size_t(n * k)), scores(size_t(n * experts));
    std::vector<int32_t> expert(size_t(n * k), -1);
    device->gate(view(x.data(), DType::f32, {n, d}), view(norm.data(), DType::f32, {d}), 1e-6F, view(h.data(), DType::f32, {n, d}), router,
                 c, view(scores.data(), DType::f32, {n, experts}),
                 {view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})}, {});
    return expert;
  };
  const std::vector<int32_t> numbers = chosen(1);
  for (const uint32_t bits : {0x7fc00000U, 0x7fffffffU, 0xffffffffU}) {
    const std::vector<int32_t> expert = chosen(std::bit_cast<float>(bits));
    for (int64_t i = 0; i < n * k; ++i) {
      if (i / k != 1) { EXPECT_EQ(expert[size_t(i)], numbers[size_t(i)]); }
      EXPECT_TRUE(expert[size_t(i)] >= 0 && expert[size_t(i)] < experts) << expert[size_t(i)];
    }
  }
}

// A group's score is the best expert in it, not the sum of the best two.
TEST_P(PointwiseTest, a_group_scores_by_its_best_expert) {
  const auto device = GetParam().open(1);
  std::vector<float> logits = {3, 0, 2.9f, 2.9f};  // groups {0, 1} and {2, 3}
  RouterConfig c;
  c.gating = Gating::group_limited_greedy, c.experts = 4, c.top_k = 1, c.groups = 2, c.top_groups = 1;
  int32_t expert = -1;
  float weight = 0;
  device->route(view(logits.data(), DType::f32, {1, 4}), c, {view(&expert, DType::i32, {1, 1}), view(&weight, DType::f32, {1, 1})});
  EXPECT_EQ(expert, 0);
}

TEST_P(PointwiseTest, equal_scores_go_to_the_lower_index) {
  const auto device = GetParam().open(1);
  std::vector<float> logits(12, 0.5f), weight(4);
  std::vector<int32_t> expert(4, -1);
  RouterConfig c;
  c.experts = 12, c.top_k = 4;
  device->route(view(logits.data(), DType::f32, {1, 12}), c,
                {view(expert.data(), DType::i32, {1, 4}), view(weight.data(), DType::f32, {1, 4})});
  EXPECT_EQ(expert, (std::vector<int32_t>{0, 1, 2, 3}));
}

INSTANTIATE_TEST_SUITE_P(every, PointwiseTest, testing::ValuesIn(machines()), [](const auto& p) { return p.param.name(); });

}  // namespace
}  // namespace mla
