// Rows of the cache in their stored types: encoding, decoding, and the parts of a row that belong to one head.
#pragma once

#include "cpu/attention.h"
#include "cpu/simd.h"

#include <cmath>

namespace mla {
namespace {

inline void put(float* to, f32x16 x) { store(to, x); }
inline void put(uint16_t* to, f32x16 x) { store_bf16(to, x); }
inline void put(float* to, f32x16 x, int n) { store(to, x, n); }
inline void put(uint16_t* to, f32x16 x, int n) { store_bf16(to, x, n); }

// n elements as T (f32, or bf16 as uint16_t). Padded: the last vector is written whole, with zeros beyond n.
template <bool padded, class T, class Load>
inline void convert(int64_t n, T* to, Load load_at) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) put(to + i, load_at(i, 16));
  if (i == n) return;
  const f32x16 last = load_at(i, int(n - i));
  if (padded)
    put(to + i, last);
  else
    put(to + i, last, int(n - i));
}

template <bool padded, class T>
inline void read_plain(DType type, const std::byte* from, int64_t n, T* to) {
  if (type == DType::f32) {
    const auto* p = reinterpret_cast<const float*>(from);
    convert<padded>(n, to, [p](int64_t i, int m) { return m == 16 ? load(p + i) : load(p + i, m); });
  } else if (type == DType::f16) {
    const auto* p = reinterpret_cast<const uint16_t*>(from);
    convert<padded>(n, to, [p](int64_t i, int m) { return m == 16 ? load_f16(p + i) : load_f16(p + i, m); });
  } else {
    const auto* p = reinterpret_cast<const uint16_t*>(from);
    convert<padded>(n, to, [p](int64_t i, int m) { return m == 16 ? load_bf16(p + i) : load_bf16(p + i, m); });
  }
}

inline f32x16 load_f8(const int8_t* p, int n) {
  uint8_t code[16] = {};
  std::memcpy(code, p, size_t(n));
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = f8_to_f32(code[i]);  // in vectors
  return load(x);
}

template <bool padded, class T>
inline void read_codes(const KvFormat& f, const int8_t* code, const float* scale, int64_t n, T* to) {
  const int64_t group = f.group();
  for (int64_t from = 0; from < n; from += group, ++scale) {
    const f32x16 s = splat(*scale);
    const int8_t* p = code + from;
    const int64_t m = n - from < group ? n - from : group;
    if (f.type == DType::f8)
      convert<padded>(m, to + from, [=](int64_t i, int k) { return s * load_f8(p + i, k); });
    else
      convert<padded>(m, to + from, [=](int64_t i, int k) { return s * (k == 16 ? load_i8(p + i) : load_i8(p + i, k)); });
  }
}

// A head's key; padded: with zeros up to a multiple of 16.
template <bool padded, class T>
inline void read_key(const KvFormat& format, const std::byte* row, int head, T* to) {
  const KvLayout& l = format.layout;
  if (!format.coded()) return read_plain<padded>(format.type, row + row_bytes(format.type, int64_t(head) * l.d_k), l.d_k, to);
  const auto* code = reinterpret_cast<const int8_t*>(row);
  const auto* scale = reinterpret_cast<const float*>(row + format.scale_offset());
  if (!l.v_in_k) return read_codes<padded>(format, code + int64_t(head) * l.d_k, scale + head * format.groups(l.d_k), l.d_k, to);
  read_codes<false>(format, code + int64_t(head) * l.d_v, scale + head * format.groups(l.d_v), l.d_v, to);
  const int rotary = l.d_k - l.d_v;
  read_plain<false>(DType::bf16, row + format.kept_offset() + 2 * int64_t(head) * rotary, rotary, to + l.d_v);
  // The rotary part begins anywhere in a vector, so a whole last vector of it could reach into the next row.
  if (padded) std::memset(to + l.d_k, 0, size_t(round_up(l.d_k, 16) - l.d_k) * sizeof(T));
}

// A head's value where it is not part of the key.
template <bool padded, class T>
inline void read_value(const KvFormat& format, const std::byte* row, int head, T* to) {
  const KvLayout& l = format.layout;
  const int64_t first = int64_t(l.heads) * l.d_k + int64_t(head) * l.d_v;
  if (!format.coded()) return read_plain<padded>(format.type, row + row_bytes(format.type, first), l.d_v, to);
  const auto* scale = reinterpret_cast<const float*>(row + format.scale_offset());
  read_codes<padded>(format, reinterpret_cast<const int8_t*>(row) + first,
                     scale + l.heads * format.groups(l.d_k) + head * format.groups(l.d_v), l.d_v, to);
}

inline void read_row(const KvFormat& format, const std::byte* row, float* to) {
  const KvLayout& l = format.layout;
  if (!format.coded()) return read_plain<false>(format.type, row, l.row(), to);
  for (int h = 0; h < l.heads; ++h) read_key<false>(format, row, h, to + int64_t(h) * l.d_k);
  for (int h = 0; h < l.heads && !l.v_in_k; ++h) read_value<false>(format, row, h, to + int64_t(l.heads) * l.d_k + int64_t(h) * l.d_v);
}

inline void write_i8(const float* from, int64_t n, int8_t* code, float* scale) {
  constexpr int64_t group = KvFormat::i8_group;
  for (int64_t g = 0; g < n; g += group, ++scale) {
    const int64_t m = n - g < group ? n - g : group;
    f32x16 most = zero_f32();
    for (int64_t i = 0; i < m; i += 16) most = max(most, abs(m - i < 16 ? load(from + g + i, int(m - i)) : load(from + g + i)));
    const float s = top(most) / 127;
    const f32x16 inverse = splat(s > 0 ? 1 / s : 0);
    // 1 / s may overflow where all values are denormal: they become zeros.
    const f32x16 limit = splat(127), floor = splat(-127);
    for (int64_t i = 0; i < m; i += 16) {
      const int k = m - i < 16 ? int(m - i) : 16;
      store_i8(code + g + i, max(floor, min(limit, load(from + g + i, k) * inverse)), k);
    }
    *scale = s;
  }
}

inline void write_f8(const float* from, int64_t n, int8_t* code, float* scale) {
  constexpr int64_t group = KvFormat::f8_group;
  for (int64_t g = 0; g < n; g += group, ++scale) {
    const int64_t m = n - g < group ? n - g : group;
    float most = 0;
    for (int64_t i = g; i < g + m; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    *scale = f8_scale(most);
    const float inverse = *scale > 0 ? 1 / *scale : 0;
    for (int64_t i = g; i < g + m; ++i) code[i] = int8_t(f32_to_f8(from[i] * inverse));
  }
}

inline void write_row(const KvFormat& format, const float* from, std::byte* row) {
  const KvLayout& l = format.layout;
  const int64_t n = l.row();
  if (format.type == DType::f32) {
    std::memcpy(row, from, size_t(n) * 4);
  } else if (format.type == DType::bf16) {
    convert<false>(n, reinterpret_cast<uint16_t*>(row), [from](int64_t i, int m) { return m == 16 ? load(from + i) : load(from + i, m); });
  } else if (format.type == DType::f16) {
    auto* to = reinterpret_cast<uint16_t*>(row);
    for (int64_t i = 0; i < n; i += 16)
      n - i < 16 ? store_f16(to + i, load(from + i, int(n - i)), int(n - i)) : store_f16(to + i, load(from + i));
  } else {
    auto* code = reinterpret_cast<int8_t*>(row);
    auto* scale = reinterpret_cast<float*>(row + format.scale_offset());
    auto* kept = reinterpret_cast<uint16_t*>(row + format.kept_offset());
    auto quantise = [&](int64_t m) {
      format.type == DType::f8 ? write_f8(from, m, code, scale) : write_i8(from, m, code, scale);
      from += m, code += m, scale += format.groups(m);
    };
    for (int h = 0; h < l.heads; ++h) {
      quantise(l.v_in_k ? l.d_v : l.d_k);
      if (!l.v_in_k) continue;
      const int rotary = l.d_k - l.d_v;
      convert<false>(rotary, kept, [from](int64_t i, int m) { return m == 16 ? load(from + i) : load(from + i, m); });
      from += rotary, kept += rotary;
    }
    for (int h = 0; h < l.heads && !l.v_in_k; ++h) quantise(l.d_v);
  }
}

}  // namespace
}  // namespace mla
