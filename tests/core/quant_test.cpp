// Quantised blocks: decoded as the gguf package decodes them, encoded within each format's error.
#include "core/quant.h"

#include "core/check.h"
#include "core/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

namespace mla::test {
namespace {

constexpr DType blocks[] = {DType::q8_0, DType::q4_0, DType::q4_1, DType::q4_k, DType::q5_k, DType::q6_k};
constexpr int64_t n = 256;  // elements of every golden

std::string golden(DType type, const char* what) {
  const std::string path = std::string(MLA_TEST_DATA "/quant/") + std::string(info(type).name) + "_" + what + ".bin";
  std::ifstream in(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  if (bytes.size() != size_t(row_bytes(type, n) + 4 * n)) throw std::runtime_error("no golden " + path);
  return bytes;
}

std::vector<float> normal(int64_t count, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(count));
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(random_normal(seed, i));
  return x;
}

std::vector<float> round_trip(DType type, const std::vector<float>& x) {
  std::vector<uint8_t> bytes(size_t(row_bytes(type, int64_t(x.size()))));
  std::vector<float> y(x.size(), std::numeric_limits<float>::quiet_NaN());
  quantise(type, x.data(), bytes.data(), int64_t(x.size()));
  dequantise(type, bytes.data(), y.data(), int64_t(x.size()));
  return y;
}

TEST(Quant, blocks_decode_as_in_the_gguf_package) {
  for (DType type : blocks) {
    const std::string bytes = golden(type, "decode");
    std::vector<float> wanted(n), got(n, std::numeric_limits<float>::quiet_NaN());
    std::memcpy(wanted.data(), bytes.data() + row_bytes(type, n), 4 * n);
    dequantise(type, bytes.data(), got.data(), n);
    for (size_t i = 0; i < n; ++i)
      EXPECT_NEAR(got[i], wanted[i], 1e-6f * std::fabs(wanted[i]) + 1e-7f) << info(type).name << " element " << i;
  }
}

TEST(Quant, blocks_encode_as_in_the_gguf_package) {
  for (DType type : {DType::q8_0, DType::q4_0, DType::q4_1}) {
    const std::string bytes = golden(type, "encode");
    std::vector<float> x(n);
    std::memcpy(x.data(), bytes.data(), 4 * n);
    std::string got(size_t(row_bytes(type, n)), '\0');
    quantise(type, x.data(), got.data(), n);
    EXPECT_TRUE(got == bytes.substr(4 * n)) << info(type).name;
  }
}

TEST(Quant, round_trips_stay_within_half_a_step) {
  const std::vector<float> x = normal(4096, 1);
  // Factors are halves, which costs 2^-11 of the magnitude. The step of a block as a share of its largest magnitude; q4_0 may clip the far
  // end by one step.
  struct Bound {
    DType type;
    int block;
    float step;
  };
  for (const Bound& bound : {Bound{DType::q8_0, 32, 1 / 127.f}, Bound{DType::q4_0, 32, 2 / 8.f}, Bound{DType::q4_1, 32, 2 / 15.f},
                             Bound{DType::q6_k, 16, 1.15f / 32}, Bound{DType::f16, 1, 0x1p-10f}, Bound{DType::bf16, 1, 0x1p-7f}}) {
    const std::vector<float> y = round_trip(bound.type, x);
    for (size_t b = 0; b < x.size(); b += size_t(bound.block)) {
      float top = 0;
      for (size_t i = b; i < b + size_t(bound.block); ++i) top = std::max(top, std::fabs(x[i]));
      const float share = bound.type == DType::q6_k ? 1.0f : 0.5f;  // q6_k's scales are rounded as well
      for (size_t i = b; i < b + size_t(bound.block); ++i)
        EXPECT_LE(std::fabs(x[i] - y[i]), (share * bound.step + 0x1p-11f) * top + 1e-6f) << info(bound.type).name << " element " << i;
    }
  }
}

// A stack of two matrices with blocks that end early on both sides.
TEST(Quant, fp8_weights_are_their_codes_times_the_scales_of_their_blocks) {
  constexpr int64_t rows = 130, cols = 200, blocks = 4;
  std::vector<uint8_t> codes(2 * rows * cols);
  std::vector<float> scales(2 * blocks), y(codes.size(), std::numeric_limits<float>::quiet_NaN());
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(random_bits(1, i) % 255), codes[i] -= codes[i] == 0x7f;
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = float(i + 1) / 7;
  Tensor t = view(codes.data(), DType::f8, {2, rows, cols});
  EXPECT_THROW(dequantise(t, y.data()), Error);
  t.scales = scales.data();
  dequantise(t, y.data());
  for (int64_t m = 0, at = 0; m < 2; ++m)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c, ++at)
        ASSERT_EQ(y[size_t(at)], scales[size_t(m * blocks + r / 128 * 2 + c / 128)] * f8_to_f32(codes[size_t(at)])) << m << r << c;
  dequantise(row_of(t, rows + 129), y.data());
  EXPECT_EQ(y[130], scales[7] * f8_to_f32(codes[(rows + 129) * cols + 130]));
}

TEST(Quant, f32_is_kept_bit_for_bit) {
  const std::vector<float> x = normal(64, 2);
  EXPECT_EQ(round_trip(DType::f32, x), x);
}

TEST(Quant, zeros_and_constants_survive) {
  for (DType type : {DType::q8_0, DType::q4_0, DType::q4_1, DType::q6_k}) {
    for (float y : round_trip(type, std::vector<float>(n, 0.0f))) EXPECT_EQ(y, 0.0f) << info(type).name;
    for (float c : {1.0f, -1.0f})
      for (float y : round_trip(type, std::vector<float>(n, c))) EXPECT_NEAR(y, c, 2e-3f) << info(type).name;
  }
}

TEST(Quant, parts_of_blocks_and_types_without_an_encoder_are_errors) {
  float x[256] = {};
  uint8_t bytes[256];
  EXPECT_THROW(quantise(DType::q8_0, x, bytes, 33), Error);
  EXPECT_THROW(dequantise(DType::q6_k, bytes, x, 128), Error);
  EXPECT_THROW(dequantise(DType::i64, bytes, x, 1), Error);
  for (int i = 0; i <= int(DType::q6_k); ++i) {
    if (can_quantise(DType(i)))
      EXPECT_NO_THROW(quantise(DType(i), x, bytes, info(DType(i)).block));
    else
      EXPECT_THROW(quantise(DType(i), x, bytes, info(DType(i)).block), Error);
  }
}

}  // namespace
}  // namespace mla::test
