// Attention over a cache in double precision, written from the definitions: what every kernel of every device is checked against.
#pragma once

#include "core/dtype.h"
#include "core/tensor.h"
#include "device/attention.h"
#include "device/device.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace mla::ref {

// One cache row's elements, [K of all heads | V of all heads], or in MLA [latent | rotary key] of each head.
inline std::vector<double> decode_row(const KvFormat& format, const std::byte* row) {
  const KvLayout& layout = format.layout;
  std::vector<double> x(layout.row());
  auto at = [row]<class T>(int64_t byte, T) {
    T value;
    std::memcpy(&value, row + byte, sizeof value);
    return value;
  };
  if (format.type == DType::f32) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = at(4 * i, 0.0f);
  } else if (format.type == DType::f16) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = f16_to_f32(at(2 * i, uint16_t()));
  } else if (format.type == DType::bf16) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = bf16_to_f32(at(2 * i, uint16_t()));
  } else {
    int64_t code = 0, kept = 0, scale = 0, element = 0;
    auto quantised = [&](int n) {
      for (int i = 0; i < n; ++i) {
        if (i > 0 && i % format.group() == 0) ++scale;
        const double x_code = format.type == DType::f8 ? double(f8_to_f32(at(code, uint8_t()))) : at(code, int8_t());
        ++code;
        x[element++] = x_code * at(format.scale_offset() + 4 * scale, 0.0f);
      }
      ++scale;
    };
    for (int h = 0; h < layout.heads; ++h) {
      quantised(layout.v_in_k ? layout.d_v : layout.d_k);
      if (!layout.v_in_k) continue;
      for (int i = layout.d_v; i < layout.d_k; ++i) x[element++] = bf16_to_f32(at(format.kept_offset() + 2 * kept++, uint16_t()));
    }
    for (int h = 0; h < layout.heads && !layout.v_in_k; ++h) quantised(layout.d_v);
  }
  return x;
}

struct Result {
  std::vector<double> o;    // [n, n_h, d_v]
  std::vector<double> lse;  // [n, n_h]
};

// Device::attend with Attend::replace; rows of q that no span names keep NaN.
inline Result attend(const Tensor& q, const Kv& kv, Spans spans, Mask mask, double scale) {
  const KvLayout& layout = kv.format.layout;
  const int64_t n = q.shape[0], n_h = q.shape[1];
  const int64_t group = n_h / layout.heads;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Result out{std::vector<double>(n * n_h * layout.d_v, nan), std::vector<double>(n * n_h, nan)};
  for (const Span& span : spans) {
    std::vector<std::vector<double>> rows;
    for (int j = 0; j < span.kv_count; ++j)
      rows.push_back(decode_row(kv.format, kv.row(span.pages[j / kv.page_tokens], j % kv.page_tokens)));
    for (int i = 0; i < span.count; ++i) {
      for (int64_t h = 0; h < n_h; ++h) {
        const int64_t g = h / group, token = span.start + i;
        const float* query = q.f32() + token * q.stride[0] + h * q.stride[1];
        const int64_t position = int64_t(span.position) + i;
        std::vector<double> score(span.kv_count, -std::numeric_limits<double>::infinity());
        double top = -std::numeric_limits<double>::infinity();
        for (int j = 0; j < span.kv_count; ++j) {
          const int64_t at = int64_t(span.kv_position) + j;
          if (mask.causal && at > position) continue;
          if (mask.window > 0 && at <= position - mask.window) continue;
          double sum = 0;
          for (int d = 0; d < layout.d_k; ++d) sum += double(query[d]) * rows[j][g * layout.d_k + d];
          top = std::max(top, score[j] = scale * sum);
        }
        double* o = out.o.data() + (token * n_h + h) * layout.d_v;
        std::fill(o, o + layout.d_v, 0.0);
        double total = 0;
        for (int j = 0; j < span.kv_count; ++j) {
          if (std::isinf(score[j])) continue;
          const double p = std::exp(score[j] - top);
          const double* v = rows[j].data() + (layout.v_in_k ? g * layout.d_k : layout.heads * layout.d_k + g * layout.d_v);
          total += p;
          for (int d = 0; d < layout.d_v; ++d) o[d] += p * v[d];
        }
        for (int d = 0; d < layout.d_v && total > 0; ++d) o[d] /= total;
        out.lse[token * n_h + h] = top + std::log(total);
      }
    }
  }
  return out;
}

}  // namespace mla::ref
