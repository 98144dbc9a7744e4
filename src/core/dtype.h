// Element types of tensors, weights and cache rows, with the sizes of GGUF's quantised blocks.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>

namespace mla {

enum class DType : uint8_t { f32, f16, bf16, i8, f8, i32, i64, u8, q8_0, q4_0, q4_1, q4_k, q5_k, q6_k };

struct DTypeInfo {
  std::string_view name;  // as --type spells it
  int block;              // elements in one block; 1 for plain types
  int block_bytes;
};

constexpr DTypeInfo info(DType type) {
  switch (type) {
    case DType::f32: return {"f32", 1, 4};
    case DType::f16: return {"f16", 1, 2};
    case DType::bf16: return {"bf16", 1, 2};
    case DType::i8: return {"i8", 1, 1};
    case DType::f8: return {"fp8", 1, 1};  // e4m3: a sign, 4 bits of exponent, 3 of fraction; up to 448, no infinities
    case DType::i32: return {"i32", 1, 4};
    case DType::i64: return {"i64", 1, 8};
    case DType::u8: return {"u8", 1, 1};
    case DType::q8_0: return {"q8_0", 32, 34};  // f16 d, 32 × i8
    case DType::q4_0: return {"q4_0", 32, 18};  // f16 d, 32 × u4 minus 8; byte j holds elements j (low) and j + 16 (high)
    case DType::q4_1: return {"q4_1", 32, 20};  // f16 d, f16 m, 32 × u4
    case DType::q4_k: return {"q4_k", 256, 144};
    case DType::q5_k: return {"q5_k", 256, 176};
    case DType::q6_k: return {"q6_k", 256, 210};
  }
  return {"?", 1, 0};
}

constexpr bool is_quantised(DType type) { return info(type).block > 1; }

// Bytes of a row of n elements; n must be a multiple of the block.
constexpr int64_t row_bytes(DType type, int64_t n) { return n / info(type).block * info(type).block_bytes; }

std::optional<DType> parse_dtype(std::string_view name);

inline float bf16_to_f32(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float f16_to_f32(uint16_t x);
uint16_t f32_to_f16(float x);

// fp8 weights have an f32 scale for each block of 128 rows × 128 columns, as DeepSeek publishes them; blocks at the ends may be smaller.
constexpr int64_t f8_block = 128;
constexpr int64_t f8_blocks(int64_t n) { return (n + f8_block - 1) / f8_block; }

inline float f8_to_f32(uint8_t x) {
  const float magnitude = std::bit_cast<float>(uint32_t(x & 0x7f) << 20) * 0x1p120f;
  const uint32_t none = (x & 0x7f) == 0x7f ? 0x7fc00000u : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | none | uint32_t(x & 0x80) << 24);
}
// Round to nearest even; what is too large becomes ±448, NaN stays NaN.
uint8_t f32_to_f8(float x);
// What numbers of at most this magnitude are divided by before: the least power of two, at most 2^7, that leaves 448 or less; 0 for zeros.
float f8_scale(float most);

}  // namespace mla
