// One element of a cache row as its format has it (KvFormat in device/attention.h).
#pragma once

#include "device/attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace mla::cuda {

// What a kernel needs of a KvFormat; the rest follows from it on the host once.
struct RowFormat {
  DType type;
  int row, row_bytes;   // elements, bytes
  int heads, d_k, d_v;  // of the layout
  bool v_in_k;
  int group, kept_offset, scale_offset, scales_a_key, scales_a_value;  // of codes

  RowFormat() = default;
  explicit RowFormat(const KvFormat& f)
      : type(f.type),
        row(int(f.layout.row())),
        row_bytes(int(f.row_bytes())),
        heads(f.layout.heads),
        d_k(f.layout.d_k),
        d_v(f.layout.d_v),
        v_in_k(f.layout.v_in_k),
        group(f.group()),
        kept_offset(int(f.kept_offset())),
        scale_offset(int(f.scale_offset())),
        scales_a_key(int(f.groups(f.layout.v_in_k ? f.layout.d_v : f.layout.d_k))),
        scales_a_value(int(f.groups(f.layout.d_v))) {}

  __device__ bool coded() const { return type == DType::i8 || type == DType::f8; }
  // Where element e of a row of codes is: its code's or kept element's index, and its scale's, -1 if it is kept.
  __device__ void place(int e, int& index, int& scale) const {
    if (v_in_k) {
      const int head = e / d_k, i = e % d_k;
      index = i < d_v ? head * d_v + i : head * (d_k - d_v) + i - d_v;
      scale = i < d_v ? head * scales_a_key + i / group : -1;
      return;
    }
    const int keys = heads * d_k;
    index = e;
    const int i = e < keys ? e % d_k : (e - keys) % d_v;
    scale = e < keys ? e / d_k * scales_a_key + i / group : heads * scales_a_key + (e - keys) / d_v * scales_a_value + i / group;
  }
};

__device__ inline float read_f8(uint8_t code) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); }

__device__ inline float read_element(const RowFormat& f, const std::byte* row, int e) {
  switch (f.type) {
    case DType::f32: return reinterpret_cast<const float*>(row)[e];
    case DType::f16: return __half2float(reinterpret_cast<const __half*>(row)[e]);
    case DType::bf16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[e]);
    default: break;
  }
  int index, scale;
  f.place(e, index, scale);
  if (scale < 0) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + f.kept_offset)[index]);
  const auto code = reinterpret_cast<const uint8_t*>(row)[index];
  return (f.type == DType::f8 ? read_f8(code) : float(int8_t(code))) * reinterpret_cast<const float*>(row + f.scale_offset)[scale];
}

}  // namespace mla::cuda
