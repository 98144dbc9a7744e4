// Products of every weight type on every device of this machine, against double precision; and that on the CPU a token's result is the
// same bit for bit whatever the batch and the threads.
#include "core/check.h"
#include "cpu/pack.h"
#include "machines.h"
#include "ref.h"
#include "tiles_by_hand/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace mla {
namespace {

struct Case {
  Machine machine;
  DType type;
  // Whether the device keeps the file's weights to the bit.
  bool keeps_weights() const {
    if (type == DType::f8) return !machine.kernels;
    return machine.kernels || type == DType::f32 || type == DType::bf16 || type == DType::q8_0 || type == DType::q4_0;
  }
  // For chains of products: errors of many columns add up like a random walk, to about this share of the outputs' size.
  double tolerance() const {
    constexpr double f32 = 6e-5, bf16 = 5e-2, i8 = 0.15;
    if (type == DType::f8) return bf16;  // weights or activations are
    const ActKind kind = machine.activations(type);
    return (kind == ActKind::f32 ? f32 : kind == ActKind::bf16 ? bf16 : i8) * (keeps_weights() ? 1 : 3);
  }
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.machine.name() << " " << info(c.type).name; }

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const Machine& m : machines())
    for (DType t :
         {DType::f32, DType::f16, DType::bf16, DType::f8, DType::q8_0, DType::q4_0, DType::q4_1, DType::q4_k, DType::q5_k, DType::q6_k})
      cases.push_back({m, t});
  for (DType t : {DType::bf16, DType::f8}) cases.push_back({{&kernels_tiles_by_hand()}, t});
  return cases;
}

std::string name_of(const testing::TestParamInfo<Case>& p) { return p.param.machine.name() + "_" + std::string(info(p.param.type).name); }

// Widths that the type allows, awkward ones first.
std::vector<int64_t> widths(DType type) {
  if (type == DType::f8) return {1, 40, 96, 128, 344, 320};
  if (!is_quantised(type)) return {1, 24, 40, 100};
  if (info(type).block == 32) return {32, 96, 320};
  return {256, 768};
}

// How far off an output may be: its weights' magnitudes times the rounding of its activations (half a step of the block's 127 levels,
// half a unit in the last place of bf16), and f32's own rounding.
double rounding_bound(ActKind kind, bool keeps_weights, const ref::Row& w, const ref::Row& x) {
  double bound = 0;
  for (size_t k = 0; k < x.size(); ++k) {
    double step = 0, most = 0;
    if (kind == ActKind::bf16) step = std::fabs(x[k]) / 256;
    if (kind == ActKind::i8 || kind == ActKind::i8_affine)
      for (size_t j = k / 32 * 32; j < std::min(x.size(), k / 32 * 32 + 32); ++j) step = std::max(step, std::fabs(x[j]) / 253);
    bound += std::fabs(w[k]) * (step + 4e-6 * std::fabs(x[k]));
    if (keeps_weights) continue;
    for (size_t j = k / 32 * 32; j < std::min(x.size(), k / 32 * 32 + 32); ++j) most = std::max(most, std::fabs(w[j]));
    bound += most / 220 * std::fabs(x[k]);
  }
  return bound;
}

struct Fixture {
  Fixture(DType type, int64_t count, int64_t rows, int64_t cols, uint64_t seed) : type(type), count(count), rows(rows), cols(cols) {
    if (type != DType::f8) {
      bytes = ref::random_blocks(type, count * rows * cols, seed);
      return;
    }
    for (const float x : ref::random_floats(count * rows * cols, seed))  // a seventh of them are small, down to zeros
      bytes.push_back(std::byte(f32_to_f8(x * (bytes.size() % 7 ? 100 : 0.005f))));
    for (int64_t i = 0; i < count * f8_blocks(rows) * f8_blocks(cols); ++i)
      scales.push_back(0.004f + 0.002f * float(random_uniform(seed + 1, uint64_t(i))));
  }

  Tensor tensor() {
    Tensor t = view(bytes.data(), type, {count, rows, cols});
    if (!scales.empty()) t.scales = scales.data();
    return t;
  }
  ref::Matrix matrix(int64_t m) {
    std::vector<float> values(size_t(count * rows * cols));
    dequantise(tensor(), values.data());
    return ref::to_double(values.data() + m * rows * cols, rows, cols, cols);
  }

  DType type;
  int64_t count, rows, cols;
  std::vector<std::byte> bytes;
  std::vector<float> scales;
};

class LinearTest : public testing::TestWithParam<Case> {};

TEST_P(LinearTest, agrees_with_double) {
  const auto device = GetParam().machine.open(2);
  const ActKind kind = GetParam().machine.activations(GetParam().type);
  for (int64_t cols : widths(GetParam().type))
    for (int64_t rows : {1, 17, GetParam().type == DType::f8 ? 150 : 48}) {
      Fixture f(GetParam().type, 1, rows, cols, uint64_t(cols + rows));
      const Weight w = device->pack(f.tensor());
      const ref::Matrix matrix = f.matrix(0);
      for (int64_t n : {1, 2, 7, 8, 9, 33, 61}) {
        // The matrix units meet coded weights as bf16 where rows are many: both factors of a term are rounded.
        const bool both_rounded =
            !GetParam().machine.kernels && n > 8 && (is_quantised(GetParam().type) || (GetParam().type == DType::f8 && cols % 32 == 0));
        auto x = ref::random_floats(n * (cols + 3), 7), bias = ref::random_floats(rows, 8), before = ref::random_floats(n * rows, 9);
        Tensor in = view(x.data(), DType::f32, {n, cols});
        in.stride[0] = cols + 3;
        for (const bool add : {false, true}) {
          std::vector<float> y(size_t(n * rows), nan);
          if (add) y = before;
          device->linear(in, w, view(bias.data(), DType::f32, {rows}), view(y.data(), DType::f32, {n, rows}), add);
          const ref::Matrix inputs = ref::to_double(x.data(), n, cols, cols + 3);
          for (int64_t i = 0; i < n; ++i)
            for (int64_t r = 0; r < rows; ++r) {
              const ref::Row& row = matrix[size_t(r)];
              const double expected =
                  ref::dot(row, inputs[size_t(i)]) + double(bias[size_t(r)]) + (add ? double(before[size_t(i * rows + r)]) : 0);
              ASSERT_NEAR(double(y[size_t(i * rows + r)]), expected,
                          rounding_bound(kind, GetParam().keeps_weights(), row, inputs[size_t(i)]) * (both_rounded ? 2.01 : 1) + 1e-6)
                  << rows << " x " << cols << ", token " << i << " of " << n;
            }
        }
      }
    }
}

// With activations that the int8 form represents exactly, nothing is left but f32 rounding: offsets and scales are right to the bit.
TEST_P(LinearTest, is_exact_for_whole_activations) {
  if (!GetParam().keeps_weights()) GTEST_SKIP() << "weights are rounded";
  const auto device = GetParam().machine.open(1);
  for (int64_t cols : widths(GetParam().type)) {
    Fixture f(GetParam().type, 1, 35, cols, 3);
    const Weight w = device->pack(f.tensor());
    std::vector<float> x(static_cast<size_t>(cols)), y(35, nan);
    for (size_t i = 0; i < x.size(); ++i) x[i] = i % 32 == 5 ? -127.0f : float(int(random_bits(4, i) % 255) - 127);
    if (GetParam().machine.activations(GetParam().type) == ActKind::bf16)
      for (float& v : x) v = std::trunc(v / 2);
    device->linear(view(x.data(), DType::f32, {1, cols}), w, {}, view(y.data(), DType::f32, {1, 35}));
    EXPECT_LT(ref::relative_error(y.data(), ref::product(f.matrix(0), ref::to_double(x.data(), 1, cols, cols)[0])), 2e-5) << cols;
  }
}

TEST_P(LinearTest, does_not_depend_on_batch_or_threads) {
  if (!GetParam().machine.kernels) GTEST_SKIP() << "on a GPU few rows go other ways than many";
  const int64_t rows = 595, cols = is_quantised(GetParam().type) ? 512 : 1100, n = 77;
  Fixture f(GetParam().type, 1, rows, cols, 11);
  const auto x = ref::random_floats(n * cols, 12);
  auto run = [&](Device& device, const Weight& w, int64_t first, int64_t count, std::vector<float>& y) {
    device.linear(view(const_cast<float*>(x.data()) + first * cols, DType::f32, {count, cols}), w, {},
                  view(y.data() + first * rows, DType::f32, {count, rows}));
  };
  std::vector<float> one(size_t(n * rows), nan), all = one, chunks = one;
  const auto serial = GetParam().machine.open(1), parallel = GetParam().machine.open(3);
  const Weight a = serial->pack(f.tensor()), b = parallel->pack(f.tensor());
  for (int64_t i = 0; i < n; ++i) run(*serial, a, i, 1, one);
  run(*parallel, b, 0, n, all);
  for (int64_t i = 0, size = 1; i < n; i += size, ++size) run(*parallel, b, i, std::min(size, n - i), chunks);
  EXPECT_EQ(0, std::memcmp(one.data(), all.data(), one.size() * 4));
  EXPECT_EQ(0, std::memcmp(one.data(), chunks.data(), one.size() * 4));
}

// Products that share their activations are, to the bit, the products one by one; f32 weights beside the type's own want other activations.
TEST_P(LinearTest, projections_together_are_projections_apart) {
  const auto device = GetParam().machine.open(2);
  const int64_t rows[] = {83, 16, 35}, cols = is_quantised(GetParam().type) ? 512 : 200, most = 83;
  for (const int64_t n : {1, 19, 61}) {
    auto x = ref::random_floats(n * cols, 71), bias = ref::random_floats(most, 72), before = ref::random_floats(3 * n * most, 73);
    std::vector<float> together = before, apart = before;
    std::vector<Weight> weights;
    for (int i = 0; i < 3; ++i)
      weights.push_back(device->pack(Fixture(i == 1 ? DType::f32 : GetParam().type, 1, rows[i], cols, uint64_t(74 + i)).tensor()));
    const Tensor in = view(x.data(), DType::f32, {n, cols});
    auto out = [&](std::vector<float>& y, int i) { return view(y.data() + i * n * most, DType::f32, {n, rows[i]}); };
    device->linear(in, {{weights[0], {}, out(together, 0)},
                        {weights[1], view(bias.data(), DType::f32, {rows[1]}), out(together, 1)},
                        {weights[2], {}, out(together, 2), true}});
    device->linear(in, weights[0], {}, out(apart, 0));
    device->linear(in, weights[1], view(bias.data(), DType::f32, {rows[1]}), out(apart, 1));
    device->linear(in, weights[2], {}, out(apart, 2), true);
    EXPECT_EQ(0, std::memcmp(together.data(), apart.data(), apart.size() * 4)) << n;
  }
}

TEST_P(LinearTest, normed_products_are_products_of_norms) {
  const auto device = GetParam().machine.open(2);
  const int64_t rows[] = {83, 35}, cols = is_quantised(GetParam().type) ? 512 : 203;
  for (const int64_t n : {1, 5, 19, 61}) {
    auto x = ref::random_floats(n * (cols + 3), 91, 3), norm = ref::random_floats(cols, 92);
    std::vector<float> h(size_t(n * cols), nan), y(size_t(n * 83), nan), z(size_t(n * 35), nan), expected(size_t(n * 83), nan);
    const Weight v = device->pack(Fixture(GetParam().type, 1, rows[0], cols, 93).tensor()),
                 w = device->pack(Fixture(GetParam().type, 1, rows[1], cols, 94).tensor());
    Tensor in = view(x.data(), DType::f32, {n, cols});
    in.stride[0] = cols + 3;
    const Tensor scale = view(norm.data(), DType::f32, {cols}), room = view(h.data(), DType::f32, {n, cols});
    const Projection both[] = {{v, {}, view(y.data(), DType::f32, {n, rows[0]})}, {w, {}, view(z.data(), DType::f32, {n, rows[1]})}};
    device->linear_normed(in, scale, 1e-6F, room, both);
    device->rms_norm(in, scale, 1e-6F, room);
    auto check = [&](const Weight& weight, const std::vector<float>& got, int64_t count) {
      device->linear(room, weight, {}, view(expected.data(), DType::f32, {n, count}));
      // A GPU rounds few rows to bf16 before they are divided by their size in the one, after it in the other.
      const double bound = GetParam().machine.kernels ? 1e-6 : n > 8 ? 5e-3 : 2e-2;
      EXPECT_LT(ref::relative_error(got.data(), {expected.begin(), expected.begin() + n * count}), bound) << n;
    };
    check(v, y, rows[0]);
    check(w, z, rows[1]);
  }
}

// With the second pass, products are those of the dequantised weights.
TEST_P(LinearTest, sixteen_bit_activations_lose_nothing) {
  if (!is_quantised(GetParam().type) || !GetParam().machine.kernels) GTEST_SKIP() << "activations are not quantised";
  const auto device = GetParam().machine.open(2);
  device->activations = Activations::i16;
  const int64_t rows = 83, cols = 512, width = 512;
  Fixture f(GetParam().type, 1, rows, cols, 81), gate(GetParam().type, 1, width, cols, 82), up(GetParam().type, 1, width, cols, 83),
      down(GetParam().type, 1, cols, width, 84);
  const Weight w = device->pack(f.tensor());
  const FfnWeights ffn{device->pack(gate.tensor()), device->pack(up.tensor()), device->pack(down.tensor())};
  for (const int64_t n : {1, 7, 33, 129}) {
    auto x = ref::random_floats(n * cols, 85);
    for (int64_t i = 0; i < n; ++i) x[size_t(i * cols + 40)] *= 300;  // an outlier costs its neighbours their bits
    std::vector<float> y(size_t(n * rows), nan), z(size_t(n * cols), 0);
    const Tensor in = view(x.data(), DType::f32, {n, cols});
    device->linear(in, w, {}, view(y.data(), DType::f32, {n, rows}));
    device->ffn(in, ffn, nullptr, view(z.data(), DType::f32, {n, cols}));
    std::vector<float> routed(z.size(), 0), weight(size_t(n), 1);
    std::vector<int32_t> expert(size_t(n), 0);
    const Routing routing{view(expert.data(), DType::i32, {n, 1}), view(weight.data(), DType::f32, {n, 1})};
    device->ffn(in, ffn, &routing, view(routed.data(), DType::f32, {n, cols}));
    EXPECT_EQ(z, routed) << n;
    for (int64_t i = 0; i < n; i += 16) {
      std::vector<float> alone(size_t(cols), 0);
      device->ffn(slice(in, 0, i, 1), ffn, nullptr, view(alone.data(), DType::f32, {1, cols}));
      ASSERT_EQ(0, std::memcmp(z.data() + i * cols, alone.data(), size_t(cols) * 4)) << i << " of " << n;
    }
    if (n > 33) continue;  // the largest of so many errors says nothing more
    ref::Row products, networks;
    for (const ref::Row& row : ref::to_double(x.data(), n, cols, cols)) {
      const ref::Row product = ref::product(f.matrix(0), row), network = ref::ffn(gate.matrix(0), up.matrix(0), down.matrix(0), row);
      products.insert(products.end(), product.begin(), product.end());
      networks.insert(networks.end(), network.begin(), network.end());
    }
    EXPECT_LT(ref::relative_error(y.data(), products), 1e-3) << n;
    EXPECT_LT(ref::relative_error(z.data(), networks), 2e-3) << n;
  }
}

// So many columns that they are cut into stretches, the last of them short; pieces with an odd number of groups; tiles that are not full.
TEST_P(LinearTest, many_tokens_meet_many_columns) {
  const auto device = GetParam().machine.open(2), serial = GetParam().machine.open(1);
  const int64_t rows = 330, cols = info(GetParam().type).block == 256 ? 1280 : 1184;
  Fixture f(GetParam().type, 1, rows, cols, 91);
  const Weight w = device->pack(f.tensor()), w1 = serial->pack(f.tensor());
  for (const int64_t n : {64, 100, 145, 250}) {
    auto x = ref::random_floats(n * cols, 92);
    std::vector<float> y(size_t(n * rows), nan), alone(size_t(rows), nan);
    const Tensor in = view(x.data(), DType::f32, {n, cols});
    device->linear(in, w, {}, view(y.data(), DType::f32, {n, rows}));
    for (int64_t i = 0; i < n; i += i + 1 == n ? 1 : std::min<int64_t>(15, n - 1 - i)) {
      const float* const got = y.data() + i * rows;
      EXPECT_LT(ref::relative_error(got, ref::product(f.matrix(0), ref::to_double(x.data() + i * cols, 1, cols, cols)[0])),
                GetParam().tolerance())
          << i << " of " << n;
      if (!GetParam().machine.kernels) continue;
      serial->linear(slice(in, 0, i, 1), w1, {}, view(alone.data(), DType::f32, {1, rows}));
      ASSERT_EQ(0, std::memcmp(got, alone.data(), size_t(rows) * 4)) << i << " of " << n;
    }
  }
}

TEST_P(LinearTest, heads_have_their_own_matrices) {
  const auto device = GetParam().machine.open(2);
  const int64_t heads = 3, rows = 40, cols = widths(GetParam().type).back();
  Fixture f(GetParam().type, heads, rows, cols, 21);
  const Weight w = device->pack(f.tensor());
  for (const int64_t n : {5, 33}) {
    auto x = ref::random_floats(n * heads * (cols + 2), 22);
    std::vector<float> y(size_t(n * heads * rows), nan);
    Tensor in = view(x.data(), DType::f32, {n, heads, cols});
    in.stride[0] = heads * (cols + 2), in.stride[1] = cols + 2;
    device->linear_heads(in, w, view(y.data(), DType::f32, {n, heads, rows}));
    ref::Row reference;
    const ref::Matrix inputs = ref::to_double(x.data(), n * heads, cols, cols + 2);
    for (int64_t i = 0; i < n * heads; ++i) {
      const ref::Row one = ref::product(f.matrix(i % heads), inputs[size_t(i)]);
      reference.insert(reference.end(), one.begin(), one.end());
    }
    EXPECT_LT(ref::relative_error(y.data(), reference), GetParam().tolerance()) << n;
  }
}

TEST_P(LinearTest, embeds_rows_exactly) {
  const auto device = GetParam().machine.open(2);
  for (int64_t cols : widths(GetParam().type)) {
    Fixture f(GetParam().type, 1, 37, cols, 31);
    const Weight packed = device->pack(f.tensor());
    const std::vector<int32_t> ids = {36, 0, 15, 16, 17, 31, 32, 3, 3, 20};
    std::vector<float> y(ids.size() * size_t(cols), nan);
    device->embed(ids, packed, view(y.data(), DType::f32, {int64_t(ids.size()), cols}));
    const ref::Matrix matrix = f.matrix(0);
    for (size_t i = 0; i < ids.size(); ++i) {
      const ref::Row& row = matrix[size_t(ids[i])];
      double rounding = 0;  // where weights are rounded to 8 bits, half a step of 127 and what the scale's own rounding makes of a code
      for (const double w : row) rounding = std::max(rounding, GetParam().keeps_weights() ? 0 : std::fabs(w) / 220);
      for (size_t c = 0; c < size_t(cols); ++c) ASSERT_NEAR(double(y[i * size_t(cols) + c]), row[c], rounding) << ids[i] << " " << c;
    }
    EXPECT_THROW(device->embed(std::vector<int32_t>{37}, packed, view(y.data(), DType::f32, {1, cols})), Error);
  }
}

// One network, and a stack of them whose tokens go to different experts; a token's sum is the same whatever goes with it.
TEST_P(LinearTest, feeds_forward) {
  const auto device = GetParam().machine.open(2), serial = GetParam().machine.open(1);
  const DType type = GetParam().type;
  const int64_t d = info(type).block == 256 ? 256
                    : is_quantised(type)    ? 96
                    : type == DType::f8     ? 224
                                            : 40,
                width = info(type).block == 256 ? 512
                        : is_quantised(type)    ? 160
                        : type == DType::f8     ? 192
                                                : 56;
  const int64_t experts = 5, k = 2;
  Fixture gate(type, experts, width, d, 41), up(type, experts, width, d, 42), down(type, experts, d, width, 43);
  auto pack = [&](Device& dev) { return FfnWeights{dev.pack(gate.tensor()), dev.pack(up.tensor()), dev.pack(down.tensor())}; };
  const FfnWeights w = pack(*device), w1 = pack(*serial);
  std::vector<ref::Matrix> gates, ups, downs;
  for (int64_t e = 0; e < experts; ++e) gates.push_back(gate.matrix(e)), ups.push_back(up.matrix(e)), downs.push_back(down.matrix(e));

  // On a GPU few rows, many and more go other ways.
  // On a processor the largest batch's activations are shared out over the threads; 33 tokens leave a tile of one.
  for (const int64_t n : GetParam().machine.kernels ? std::vector<int64_t>{23, 33, 16384 / d + 1} : std::vector<int64_t>{5, 23, 90})
    for (const int way : {0, 1, 2}) {
      const bool routed = way > 0, together = way == 2;  // all tokens to the same experts
      auto x = ref::random_floats(n * d, 44), weight = ref::random_floats(n * k, 45), start = ref::random_floats(n * d, 46);
      std::vector<int32_t> expert;
      for (int64_t i = 0; i < n; ++i) {  // in any order, some later ones twice
        const auto low = int32_t(i % 3), high = int32_t(3 + i % 2 * (i % 5 != 0));
        expert.insert(expert.end(), {i % 4 == 1 ? high : low, i % 4 == 1 || (i > 33 && i % 7 == 3) ? low : high});
        if (together) expert[size_t(2 * i)] = 2, expert[size_t(2 * i + 1)] = 4;
      }
      Tensor in = view(x.data(), DType::f32, {n, d});
      std::vector<float> y = start, alone = start;
      const Routing routing{view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})};
      // What is not written of the next call's activations is NaN.
      std::vector<float> nans(size_t(n * d), nan), lost(size_t(n * d));
      device->ffn(view(nans.data(), DType::f32, {n, d}), w, routed ? &routing : nullptr, view(lost.data(), DType::f32, {n, d}));
      device->ffn(in, w, routed ? &routing : nullptr, view(y.data(), DType::f32, {n, d}));
      for (int64_t i = 0; i < n; ++i) {
        const Routing one{slice(routing.expert, 0, i, 1), slice(routing.weight, 0, i, 1)};
        serial->ffn(slice(in, 0, i, 1), w1, routed ? &one : nullptr, view(alone.data() + i * d, DType::f32, {1, d}));
        if (GetParam().machine.kernels) {
          ASSERT_EQ(0, std::memcmp(y.data() + i * d, alone.data() + i * d, size_t(d) * 4))
              << (routed ? "routed " : "dense ") << i << " of " << n;
        }
      }
      if (GetParam().machine.kernels && n > 33) continue;  // the same as alone; the largest of so many errors says nothing more

      const ref::Matrix inputs = ref::to_double(x.data(), n, d, d);
      ref::Row reference(start.begin(), start.end());
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < (routed ? k : 1); ++j) {
          const size_t e = routed ? size_t(expert[size_t(i * k + j)]) : 0;
          const ref::Row one = ref::ffn(gates[e], ups[e], downs[e], inputs[size_t(i)]);
          for (int64_t c = 0; c < d; ++c) reference[size_t(i * d + c)] += one[size_t(c)] * (routed ? double(weight[size_t(i * k + j)]) : 1);
        }
      EXPECT_LT(ref::relative_error(y.data(), reference), GetParam().tolerance()) << (routed ? "routed " : "dense ") << n;
    }
}

// Files mix types. Where one product leaves its results for the next, both agree on how they lie.
TEST_P(LinearTest, feeds_forward_in_types_of_its_own) {
  const auto device = GetParam().machine.open(2);
  const int64_t d = 256, width = 256, experts = 2;
  const DType own = GetParam().type;
  for (const DType other : {DType::f32, DType::bf16, DType::q8_0, DType::q4_0})
    for (int odd = 0; odd < 3; ++odd) {  // gate, up or down
      auto type_of = [&](int i) { return i == odd ? other : own; };
      Fixture gate(type_of(0), experts, width, d, 171), up(type_of(1), experts, width, d, 172), down(type_of(2), experts, d, width, 173);
      const FfnWeights w{device->pack(gate.tensor()), device->pack(up.tensor()), device->pack(down.tensor())};
      const ref::Matrix gates = gate.matrix(1), ups = up.matrix(1), downs = down.matrix(1);
      for (const int64_t n : {1, 5, 40}) {
        auto x = ref::random_floats(n * d, 174);
        std::vector<float> y(size_t(n * d), 0), weight(size_t(n), 1);
        std::vector<int32_t> expert;
        for (int64_t i = 0; i < n; ++i) expert.push_back(int32_t((n - i) % 2));  // the last token's is expert 1
        const Routing routing{view(expert.data(), DType::i32, {n, 1}), view(weight.data(), DType::f32, {n, 1})};
        device->ffn(view(x.data(), DType::f32, {n, d}), w, &routing, view(y.data(), DType::f32, {n, d}));
        const ref::Row expected = ref::ffn(gates, ups, downs, ref::to_double(x.data(), n, d, d).back());
        // Eight bits of activations are worth 0.15 here, columns in a wrong order more than 1.
        EXPECT_LT(ref::relative_error(y.data() + (n - 1) * d, expected), 0.3)
            << info(own).name << ", " << odd << " in " << info(other).name << ", " << n << " tokens";
        std::vector<float> dense(size_t(n * d), 0);
        device->ffn(view(x.data(), DType::f32, {n, d}), w, nullptr, view(dense.data(), DType::f32, {n, d}));
        const ref::Row all = ref::ffn(gate.matrix(0), up.matrix(0), down.matrix(0), ref::to_double(x.data(), n, d, d).back());
        EXPECT_LT(ref::relative_error(dense.data() + (n - 1) * d, all), 0.3) << info(own).name << ", dense, " << n << " tokens";
      }
    }
}

// What every token has of a mixture, along with its gate, of which few tokens' are one launch on a GPU.
TEST_P(LinearTest, feeds_shared_experts_behind_a_gate) {
  const auto device = GetParam().machine.open(2);
  const DType type = GetParam().type;
  const bool wide = info(type).block == 256;
  const int64_t d = wide ? 512 : 96, width = wide ? 5120 : 4256, experts = 19, k = 3;  // more groups of rows than blocks
  Fixture gate(type, 1, width, d, 161), up(type, 1, width, d, 162), down(type, 1, d, width, 163);
  const FfnWeights shared{device->pack(gate.tensor()), device->pack(up.tensor()), device->pack(down.tensor())};
  const ref::Matrix gates = gate.matrix(0), ups = up.matrix(0), downs = down.matrix(0);
  auto router_values = ref::random_floats(experts * d, 164), norm = ref::random_floats(d, 165);
  const Weight router = device->pack(view(router_values.data(), DType::f32, {experts, d}));
  RouterConfig c;
  c.experts = experts, c.top_k = k;
  for (const int64_t n : {1, 3, 8, 11}) {
    auto x = ref::random_floats(n * (d + 4), 166, 3);
    const auto before = x;
    std::vector<float> h(size_t(n * d), nan), scores(size_t(n * experts), nan), weight(size_t(n * k), nan);
    std::vector<int32_t> expert(size_t(n * k), -1);
    Tensor stream = view(x.data(), DType::f32, {n, d});
    stream.stride[0] = d + 4;
    device->gate(stream, view(norm.data(), DType::f32, {d}), 1e-6F, view(h.data(), DType::f32, {n, d}), router, c,
                 view(scores.data(), DType::f32, {n, experts}),
                 {view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})}, shared);
    for (int64_t i = 0; i < n; ++i) {
      const float *from = before.data() + i * (d + 4), *score = scores.data() + i * experts;
      const ref::Row normed = ref::rms_norm({from, from + d}, {norm.begin(), norm.end()}, 1e-6);
      EXPECT_LT(ref::relative_error(h.data() + i * d, normed), 2e-6);
      EXPECT_LT(ref::relative_error(score, ref::product(ref::to_double(router_values.data(), experts, d, d), normed)), 1e-5);
      const ref::Route r = ref::route({score, score + experts}, c);
      EXPECT_EQ(r.expert, std::vector<int>(expert.begin() + i * k, expert.begin() + (i + 1) * k));
      EXPECT_LT(ref::relative_error(weight.data() + i * k, r.weight), 1e-5);
      ref::Row expected = ref::ffn(gates, ups, downs, normed);
      for (int64_t j = 0; j < d; ++j) expected[size_t(j)] += from[j];
      EXPECT_LT(ref::relative_error(x.data() + i * (d + 4), expected), GetParam().tolerance()) << n;
      for (int64_t j = d; j < d + 4; ++j) ASSERT_EQ(x[size_t(i * (d + 4) + j)], from[j]);
    }
  }
}

TEST_P(LinearTest, more_rows_than_a_grid_is_high) {
  if (GetParam().machine.kernels) GTEST_SKIP() << "processors have no grids";
  const auto device = GetParam().machine.open(1);
  const int64_t rows = 70000, cols = 256, n = 50;
  Fixture f(GetParam().type, 1, rows, cols, 151);
  const Weight w = device->pack(f.tensor());
  auto x = ref::random_floats(n * cols, 152);
  std::vector<float> y(size_t(n * rows), nan);
  device->linear(view(x.data(), DType::f32, {n, cols}), w, {}, view(y.data(), DType::f32, {n, rows}));
  const ref::Matrix matrix = f.matrix(0);
  const ref::Row first = ref::to_double(x.data(), n, cols, cols)[0];
  EXPECT_LT(ref::relative_error(y.data(), ref::product(matrix, first)), GetParam().tolerance());
  for (const float v : y) ASSERT_FALSE(std::isnan(v));
}

TEST_P(LinearTest, keeps_the_size_of_the_file) {
  if (!GetParam().machine.kernels) GTEST_SKIP() << "a GPU pads";
  const auto device = GetParam().machine.open(1);
  Fixture f(GetParam().type, 1, 32, 512, 51);
  EXPECT_EQ(device->pack(f.tensor()).bytes(), int64_t(f.bytes.size()) * (f.type == DType::f8 ? 2 : 1));
}

INSTANTIATE_TEST_SUITE_P(every, LinearTest, testing::ValuesIn(all_cases()), name_of);

TEST(Linear, says_which_shapes_do_not_fit) {
  const auto device = make_cpu(1);
  std::vector<float> x(64);
  const Weight w = device->pack(view(x.data(), DType::f32, {4, 16}));
  EXPECT_THROW(device->linear(view(x.data(), DType::f32, {2, 8}), w, {}, view(x.data(), DType::f32, {2, 4})), Error);
  EXPECT_THROW(device->linear(view(x.data(), DType::f32, {2, 16}), w, {}, view(x.data(), DType::f32, {1, 4})), Error);
  EXPECT_THROW(device->pack(view(x.data(), DType::i32, {4, 16})), Error);
}

TEST(Isa, is_forced_by_the_environment) {
  setenv("MLA_ISA", "plain", 1);
  EXPECT_STREQ(choose_kernels().name, "plain");
  setenv("MLA_ISA", "mmx", 1);
  try {
    choose_kernels();
    FAIL() << "an unknown instruction set was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_NE(std::string(e.what()).find("'mmx'"), std::string::npos);
  }
  unsetenv("MLA_ISA");
  // Otherwise the newest, but for those that run bf16 dots slower than f32.
  const auto list = available_kernels();
  const Kernels* chosen = &choose_kernels();
  EXPECT_NE(std::find(list.begin(), list.end(), chosen), list.end());
  EXPECT_TRUE(chosen == list.back() || std::string(list.back()->name) == "avx512_bf16") << chosen->name;
}

TEST(Probe, finds_every_ceiling) {
  const Ceilings c = make_cpu(1)->probe(0.2);
  EXPECT_GT(c.read_gb_s, 0.1);
  EXPECT_GT(c.int8_gop_s, 0.1);
  EXPECT_GT(c.bf16_gflop_s, 0.1);
  EXPECT_GT(c.f32_gflop_s, 0.1);
}

}  // namespace
}  // namespace mla
