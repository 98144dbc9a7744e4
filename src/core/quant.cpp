// GGUF's block formats, decoded and encoded one block at a time, and rows of fp8.
#include "core/quant.h"

#include "core/check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace mla {
namespace {

uint16_t load16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
void store16(uint8_t* p, uint16_t x) { p[0] = uint8_t(x), p[1] = uint8_t(x >> 8); }
float load_half(const uint8_t* p) { return f16_to_f32(load16(p)); }

// Sub-block j of Q4_K and Q5_K: a 6-bit scale and a 6-bit minimum, eight of each in 12 bytes.
struct ScaleMin {
  int scale, min;
};
ScaleMin scale_min(const uint8_t* s, int j) {
  if (j < 4) return {s[j] & 63, s[j + 4] & 63};
  return {(s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4};
}

void decode_q8_0(const uint8_t* b, float* y) {
  const float d = load_half(b);
  for (int j = 0; j < 32; ++j) y[j] = d * float(int8_t(b[2 + j]));
}

void decode_q4(const uint8_t* codes, float d, float m, float* y) {
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float(codes[j] & 15) + m;
    y[j + 16] = d * float(codes[j] >> 4) + m;
  }
}

void decode_q4_0(const uint8_t* b, float* y) {
  const float d = load_half(b);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * float((b[2 + j] & 15) - 8);
    y[j + 16] = d * float((b[2 + j] >> 4) - 8);
  }
}

void decode_q4_k(const uint8_t* b, float* y) {
  const float d = load_half(b), dmin = load_half(b + 2);
  for (int j = 0; j < 8; ++j) {
    const auto [scale, min] = scale_min(b + 4, j);
    const uint8_t* codes = b + 16 + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) y[32 * j + i] = d * float(scale) * float(j % 2 ? codes[i] >> 4 : codes[i] & 15) - dmin * float(min);
  }
}

void decode_q5_k(const uint8_t* b, float* y) {
  const float d = load_half(b), dmin = load_half(b + 2);
  const uint8_t* high = b + 16;
  for (int j = 0; j < 8; ++j) {
    const auto [scale, min] = scale_min(b + 4, j);
    const uint8_t* codes = b + 48 + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) {
      const int code = (j % 2 ? codes[i] >> 4 : codes[i] & 15) | ((high[i] >> j) & 1) << 4;
      y[32 * j + i] = d * float(scale) * float(code) - dmin * float(min);
    }
  }
}

void decode_q6_k(const uint8_t* b, float* y) {
  const float d = load_half(b + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
    const auto* scales = reinterpret_cast<const int8_t*>(b + 192 + 8 * half);
    for (int i = 0; i < 128; ++i) {
      const int quarter = i / 32, l = i % 32;
      const int nibble = quarter < 2 ? low[l + 32 * quarter] & 15 : low[l + 32 * (quarter - 2)] >> 4;
      const int code = (nibble | ((high[l] >> (2 * quarter)) & 3) << 4) - 32;
      y[128 * half + i] = d * float(scales[i / 16]) * float(code);
    }
  }
}

void encode_q8_0(const float* x, uint8_t* b) {
  float top = 0;
  for (int j = 0; j < 32; ++j) top = std::max(top, std::fabs(x[j]));
  const float d = top / 127, inverse = d > 0 ? 1 / d : 0;
  store16(b, f32_to_f16(d));
  for (int j = 0; j < 32; ++j) b[2 + j] = uint8_t(int8_t(std::lrintf(x[j] * inverse)));
}

void encode_q4_0(const float* x, uint8_t* b) {
  float extreme = 0;  // the element of the largest magnitude takes code 0, which stands for -8
  for (int j = 0; j < 32; ++j)
    if (std::fabs(x[j]) > std::fabs(extreme)) extreme = x[j];
  const float d = extreme / -8, inverse = d != 0 ? 1 / d : 0;
  store16(b, f32_to_f16(d));
  auto code = [&](float v) { return uint8_t(std::clamp(int(std::floor(v * inverse + 8.5f)), 0, 15)); };
  for (int j = 0; j < 16; ++j) b[2 + j] = uint8_t(code(x[j]) | code(x[j + 16]) << 4);
}

void encode_q4_1(const float* x, uint8_t* b) {
  const auto [low, high] = std::minmax_element(x, x + 32);
  const float m = *low, d = (*high - m) / 15, inverse = d > 0 ? 1 / d : 0;
  store16(b, f32_to_f16(d));
  store16(b + 2, f32_to_f16(m));
  auto code = [&](float v) { return uint8_t(std::clamp(int(std::floor((v - m) * inverse + 0.5f)), 0, 15)); };
  for (int j = 0; j < 16; ++j) b[4 + j] = uint8_t(code(x[j]) | code(x[j + 16]) << 4);
}

void encode_q6_k(const float* x, uint8_t* b) {
  std::array<float, 16> scale;
  float top = 0;
  for (int s = 0; s < 16; ++s) {
    float extreme = 0;
    for (int i = 0; i < 16; ++i)
      if (std::fabs(x[16 * s + i]) > std::fabs(extreme)) extreme = x[16 * s + i];
    scale[size_t(s)] = extreme / -32;
    if (std::fabs(scale[size_t(s)]) > std::fabs(top)) top = scale[size_t(s)];
  }
  std::memset(b, 0, 210);
  if (top == 0) return;
  const float d = f16_to_f32(f32_to_f16(top / -128));
  store16(b + 208, f32_to_f16(top / -128));
  for (int s = 0; s < 16; ++s) {
    const int scale_code = d == 0 ? 0 : std::clamp(int(std::lrintf(scale[size_t(s)] / d)), -128, 127);
    b[192 + s] = uint8_t(int8_t(scale_code));
    const float step = d * float(scale_code), inverse = step != 0 ? 1 / step : 0;
    for (int i = 0; i < 16; ++i) {
      const int at = 16 * s + i, half = at / 128, quarter = at % 128 / 32, l = at % 32;
      const int code = std::clamp(int(std::lrintf(x[at] * inverse)), -32, 31) + 32;
      b[64 * half + l + 32 * (quarter % 2)] |= uint8_t((code & 15) << (quarter < 2 ? 0 : 4));
      b[128 + 32 * half + l] |= uint8_t((code >> 4) << (2 * quarter));
    }
  }
}

template <class Decode>
void decode_blocks(DType type, const void* from, float* to, int64_t n, Decode decode) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < n / info(type).block; ++i) decode(bytes + i * info(type).block_bytes, to + i * info(type).block);
}

template <class Encode>
void encode_blocks(DType type, const float* from, void* to, int64_t n, Encode encode) {
  auto* bytes = static_cast<uint8_t*>(to);
  for (int64_t i = 0; i < n / info(type).block; ++i) encode(from + i * info(type).block, bytes + i * info(type).block_bytes);
}

}  // namespace

void dequantise(DType type, const void* from, float* to, int64_t n) {
  CHECK(n % info(type).block == 0, "{} elements are no whole number of {} blocks", n, info(type).name);
  const auto* half = static_cast<const uint16_t*>(from);
  switch (type) {
    case DType::f32: std::memcpy(to, from, size_t(n) * 4); return;
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) to[i] = f16_to_f32(half[i]);
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(half[i]);
      return;
    case DType::q8_0: return decode_blocks(type, from, to, n, decode_q8_0);
    case DType::q4_0: return decode_blocks(type, from, to, n, decode_q4_0);
    case DType::q4_1:
      return decode_blocks(type, from, to, n, [](const uint8_t* b, float* y) { decode_q4(b + 4, load_half(b), load_half(b + 2), y); });
    case DType::q4_k: return decode_blocks(type, from, to, n, decode_q4_k);
    case DType::q5_k: return decode_blocks(type, from, to, n, decode_q5_k);
    case DType::q6_k: return decode_blocks(type, from, to, n, decode_q6_k);
    default: fail("{} has no numeric decoding", info(type).name);
  }
}

Tensor row_of(const Tensor& t, int64_t row) {
  const int64_t cols = t.shape[t.rank - 1];
  Tensor out = view(static_cast<std::byte*>(t.data) + row * row_bytes(t.dtype, cols), t.dtype, {cols}, t.place);
  if (!t.scales) return out;
  const int64_t rows = t.rank > 1 ? t.shape[t.rank - 2] : 1;
  out.scales = t.scales + (row / rows * f8_blocks(rows) + row % rows / f8_block) * f8_blocks(cols);
  return out;
}

void dequantise(const Tensor& t, float* to) {
  if (t.dtype != DType::f8) return dequantise(t.dtype, t.data, to, t.count());
  CHECK(t.scales, "fp8 weights {} without scales", describe(t));
  const int64_t cols = t.shape[t.rank - 1];
  for (int64_t r = 0; r < t.count() / cols; ++r) {
    const Tensor row = row_of(t, r);
    for (int64_t i = 0; i < cols; ++i) to[r * cols + i] = row.scales[i / f8_block] * f8_to_f32(row.as<uint8_t>()[i]);
  }
}

bool can_quantise(DType type) {
  switch (type) {
    case DType::f32:
    case DType::f16:
    case DType::bf16:
    case DType::q8_0:
    case DType::q4_0:
    case DType::q4_1:
    case DType::q6_k: return true;
    default: return false;
  }
}

void quantise(DType type, const float* from, void* to, int64_t n) {
  CHECK(n % info(type).block == 0, "{} elements are no whole number of {} blocks", n, info(type).name);
  auto* half = static_cast<uint16_t*>(to);
  switch (type) {
    case DType::f32: std::memcpy(to, from, size_t(n) * 4); return;
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) half[i] = f32_to_f16(from[i]);
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) half[i] = f32_to_bf16(from[i]);
      return;
    case DType::q8_0: return encode_blocks(type, from, to, n, encode_q8_0);
    case DType::q4_0: return encode_blocks(type, from, to, n, encode_q4_0);
    case DType::q4_1: return encode_blocks(type, from, to, n, encode_q4_1);
    case DType::q6_k: return encode_blocks(type, from, to, n, encode_q6_k);
    default: fail("writing {} is not offered; choose f32, f16, bf16, q8_0, q4_0, q4_1 or q6_k", info(type).name);
  }
}

}  // namespace mla
