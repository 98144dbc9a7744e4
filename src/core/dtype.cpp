// Names and conversions of half and quarter precision.
#include "core/dtype.h"

#include <algorithm>

namespace mla {

std::optional<DType> parse_dtype(std::string_view name) {
  for (int i = 0; i <= int(DType::q6_k); ++i)
    if (info(DType(i)).name == name) return DType(i);
  return std::nullopt;
}

float f16_to_f32(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, fraction = x & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float subnormal = float(fraction) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

uint16_t f32_to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                 // below 2^-14: count in units of 2^-24
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p24f;
    const float rounded = (scaled + 0x1p23f) - 0x1p23f;
    return uint16_t(sign | uint32_t(rounded));
  }
  return uint16_t(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13));
}

uint8_t f32_to_f8(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const auto sign = uint8_t(bits >> 24 & 0x80);
  if (magnitude > 0x7f800000) return sign | 0x7f;
  if (magnitude >= 0x43e00000) return sign | 0x7e;  // 448
  if (magnitude < 0x3c800000) {                     // below 2^-6: count in units of 2^-9
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p9f;
    const float rounded = (scaled + 0x1p23f) - 0x1p23f;
    return uint8_t(sign | uint8_t(rounded));
  }
  return uint8_t(sign | ((magnitude + 0x7ffff + ((magnitude >> 20) & 1) - 0x3c000000) >> 20));
}

float f8_scale(float most) {
  const uint32_t up = (std::bit_cast<uint32_t>(most / 448) + 0x7fffff) & 0x7f800000;
  return std::min(std::bit_cast<float>(up), 0x1p7f);
}

}  // namespace mla
