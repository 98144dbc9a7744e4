// Half precision: every one of the 65536 patterns, and the rounding of what lies between two of them.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace mla::test {
namespace {

// By definition: sign, 5 bits of exponent, 10 bits of fraction.
double f16_value(uint16_t x) {
  const int exponent = (x >> 10) & 31, fraction = x & 1023;
  const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return x & 0x8000 ? -magnitude : magnitude;
}

TEST(DType, every_half_decodes_to_its_value_and_comes_back) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto x = uint16_t(i);
    const float value = f16_to_f32(x);
    if (std::isnan(f16_value(x))) {
      ASSERT_TRUE(std::isnan(value) && std::isnan(f16_to_f32(f32_to_f16(value)))) << i;
      continue;
    }
    ASSERT_EQ(double(value), f16_value(x)) << i;
    ASSERT_EQ(std::signbit(value), (x & 0x8000) != 0) << i;
    ASSERT_EQ(f32_to_f16(value), x) << i;
  }
}

TEST(DType, between_two_halves_the_nearer_is_taken_and_the_even_one_in_the_middle) {
  for (uint16_t x = 0; x < 0x7bff; ++x) {
    const float low = f16_to_f32(x), high = f16_to_f32(uint16_t(x + 1)), middle = (low + high) / 2;
    ASSERT_EQ(f32_to_f16(middle), x % 2 ? x + 1 : x) << x;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, low)), x) << x;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, high)), x + 1) << x;
    ASSERT_EQ(f32_to_f16(-middle), (x % 2 ? x + 1 : x) | 0x8000) << x;
  }
}

TEST(DType, halves_overflow_to_infinity) {
  EXPECT_EQ(f32_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(-1e30f), 0xfc00);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::infinity()), 0x7c00);
}

TEST(DType, every_f8_decodes_and_comes_back) {
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, fraction = i & 7;
    const double magnitude = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    const float value = f8_to_f32(uint8_t(i));
    if ((i & 0x7f) == 0x7f) {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_EQ(f32_to_f8(value), i);
      continue;
    }
    ASSERT_EQ(double(value), i & 0x80 ? -magnitude : magnitude) << i;
    ASSERT_EQ(f32_to_f8(value), i);
  }
}

TEST(DType, f8_rounds_to_nearest_even_and_stops_at_its_largest) {
  for (int x = 0; x < 0x7e; ++x) {
    const float low = f8_to_f32(uint8_t(x)), high = f8_to_f32(uint8_t(x + 1)), middle = (low + high) / 2;
    ASSERT_EQ(f32_to_f8(middle), x % 2 ? x + 1 : x) << x;
    ASSERT_EQ(f32_to_f8(std::nextafter(middle, low)), x) << x;
    ASSERT_EQ(f32_to_f8(std::nextafter(middle, high)), x + 1) << x;
    ASSERT_EQ(f32_to_f8(-middle), (x % 2 ? x + 1 : x) | 0x80) << x;
  }
  EXPECT_EQ(f32_to_f8(449.0f), 0x7e);
  EXPECT_EQ(f32_to_f8(-std::numeric_limits<float>::infinity()), 0xfe);
}

TEST(DType, f8_scales_are_the_least_powers_of_two_that_suffice) {
  EXPECT_EQ(f8_scale(0), 0);
  EXPECT_EQ(f8_scale(448), 1);
  EXPECT_EQ(f8_scale(std::nextafter(448.0f, 449.0f)), 2);
  EXPECT_EQ(f8_scale(1), 0x1p-8f);
  EXPECT_EQ(f8_scale(1e-40f), 0x1p-126f);
  EXPECT_EQ(f8_scale(1e30f), 0x1p7f);
}

TEST(DType, every_bf16_decodes_and_comes_back) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const float value = bf16_to_f32(uint16_t(i));
    if (std::isnan(value))
      ASSERT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(value)))) << i;
    else
      ASSERT_EQ(f32_to_bf16(value), i);
  }
}

TEST(DType, bf16_rounds_to_nearest_even) {
  for (uint16_t x = 0; x < 0x7f7f; ++x) {
    const uint32_t middle = uint32_t(x) << 16 | 0x8000;
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle)), x % 2 ? x + 1 : x) << x;
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle - 1)), x) << x;
    ASSERT_EQ(f32_to_bf16(std::bit_cast<float>(middle + 1)), x + 1) << x;
  }
  EXPECT_EQ(f32_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
}

TEST(DType, names_are_parsed_back) {
  for (int i = 0; i <= int(DType::q6_k); ++i) EXPECT_EQ(parse_dtype(info(DType(i)).name), DType(i));
  EXPECT_EQ(parse_dtype("q3_k"), std::nullopt);
  EXPECT_EQ(parse_dtype(""), std::nullopt);
}

}  // namespace
}  // namespace mla::test
