// Weights from the file's blocks to the kernels' order (pack.h), on the GPU, and single rows of them back.
#include "cuda/codes.cuh"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace mla::cuda {
namespace {

__device__ float half_at(const uint8_t* p) {
  const uint16_t bits = uint16_t(p[0] | p[1] << 8);
  return __half2float(__ushort_as_half(bits));
}

// Six-bit scale and minimum `j` of a k-quant's twelve bytes.
__device__ void scale_min(const uint8_t* q, int j, int& scale, int& minimum) {
  if (j < 4)
    scale = q[j] & 63, minimum = q[j + 4] & 63;
  else
    scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, minimum = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
}

// Element e of a block as the file has it (docs of GGUF's types: src/core/quant.cpp).
__device__ float element(DType type, const uint8_t* b, int e) {
  switch (type) {
    case DType::q8_0: return half_at(b) * float(int8_t(b[2 + e]));
    case DType::q4_0: return half_at(b) * float(int(e < 16 ? b[2 + e] & 15 : b[2 + e - 16] >> 4) - 8);
    case DType::q4_1: return half_at(b) * float(e < 16 ? b[4 + e] & 15 : b[4 + e - 16] >> 4) + half_at(b + 2);
    case DType::q4_k: {
      int scale, minimum;
      scale_min(b + 4, e / 32, scale, minimum);
      const uint8_t byte = b[16 + e / 64 * 32 + e % 32];
      return half_at(b) * float(scale) * float(e / 32 % 2 ? byte >> 4 : byte & 15) - half_at(b + 2) * float(minimum);
    }
    case DType::q5_k: {
      int scale, minimum;
      scale_min(b + 4, e / 32, scale, minimum);
      const uint8_t byte = b[48 + e / 64 * 32 + e % 32];
      const int code = (e / 32 % 2 ? byte >> 4 : byte & 15) + (b[16 + e % 32] >> (e / 32) & 1) * 16;
      return half_at(b) * float(scale) * float(code) - half_at(b + 2) * float(minimum);
    }
    case DType::q6_k: {
      const int half = e / 128, r = e % 128, quarter = r / 32, i = r % 32;
      const uint8_t low = b[half * 64 + quarter % 2 * 32 + i], high = b[128 + half * 32 + i];
      const int code = int(quarter < 2 ? low & 15 : low >> 4) | (high >> (2 * quarter) & 3) << 4;
      return half_at(b + 208) * float(int8_t(b[192 + half * 8 + quarter * 2 + i / 16])) * float(code - 32);
    }
    default: return 0;
  }
}

struct Source {
  const uint8_t* data;
  DType type;
  int block, block_bytes;
  int64_t row_bytes;

  __device__ float at(int64_t row, int column) const {
    const uint8_t* p = data + row * row_bytes;
    if (type == DType::f32) return reinterpret_cast<const float*>(p)[column];
    if (type == DType::bf16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p)[column]);
    if (type == DType::f16) return __half2float(reinterpret_cast<const __half*>(p)[column]);
    return element(type, p + column / block * block_bytes, column % block);
  }
};

// Where the code of column k of a row is, and, for q4_0, which nibble of that byte.
__device__ int q8_place(int k) { return k / 64 * 64 + k % 32 / 8 * 16 + k / 32 % 2 * 8 + k % 8; }
__device__ int q4_place(int k) { return k / 128 * 64 + k % 32 / 8 * 16 + k / 32 % 4 * 4 + (k % 2 * 16 + k % 8 / 2 * 4) / 8; }
__device__ int q4_shift(int k) { return k % 8 / 2 % 2 * 4; }

// A warp packs 32 columns of a row, from row `first` on.
__global__ void pack_kernel(Source from, PackedMatrix to, int first) {
  begin_kernel();
  const int lane = int(threadIdx.x), row = first + int(blockIdx.y * blockDim.y + threadIdx.y), column = int(blockIdx.x) * 32 + lane;
  if (row >= to.padded_rows()) return;
  const bool inside = row < to.rows && column < to.cols;
  if (to.type == DType::f8) {
    const_cast<std::byte*>(to.codes(0, row))[q8_place(column)] = std::byte(inside ? from.data[(row - first) * from.row_bytes + column] : 0);
    return;
  }
  const float x = inside ? from.at(row - first, column) : 0;
  auto* codes = const_cast<std::byte*>(to.codes(0, row));
  if (to.type == DType::f32) {
    if (column < to.pitch) reinterpret_cast<float*>(codes)[column] = x;
    return;
  }
  if (to.type == DType::bf16) {
    reinterpret_cast<__nv_bfloat16*>(codes)[column] = __float2bfloat16(x);
    return;
  }
  float scale;
  if (from.type == to.type) {
    const int at = column - lane;
    scale = row < to.rows && at < to.cols ? half_at(from.data + (row - first) * from.row_bytes + at / from.block * from.block_bytes) : 0;
  } else {
    float most = fabsf(x);
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    scale = __half2float(__float2half(most / 127));
  }
  // x is a multiple of the scale, or is rounded to one.
  const int code = scale != 0 ? __float2int_rn(x / scale) : 0;
  if (lane == 0) reinterpret_cast<__half*>(const_cast<std::byte*>(to.scales(0, row)))[column / 32] = __float2half(scale);
  if (to.type == DType::q8_0) {
    reinterpret_cast<int8_t*>(codes)[q8_place(column)] = int8_t(max(-128, min(127, code)));
  } else {
    // Two columns share a byte: those 2 apart.
    const int other = __shfl_xor_sync(~0u, code, 2);
    if (q4_shift(column) == 0) codes[q4_place(column)] = std::byte((code + 8) | (other + 8) << 4);
  }
}

__device__ float packed_at(const PackedMatrix& m, int64_t matrix, int64_t row, int column) {
  const std::byte* codes = m.codes(matrix, row);
  if (m.type == DType::f32) return reinterpret_cast<const float*>(codes)[column];
  if (m.type == DType::bf16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(codes)[column]);
  if (m.type == DType::f8)
    return reinterpret_cast<const float*>(m.scales(matrix, row))[column / 128] * code_value(uint8_t(codes[q8_place(column)]));
  const float scale = __half2float(reinterpret_cast<const __half*>(m.scales(matrix, row))[column / 32]);
  if (m.type == DType::q8_0) return scale * float(reinterpret_cast<const int8_t*>(codes)[q8_place(column)]);
  return scale * float(int(uint8_t(codes[q4_place(column)]) >> q4_shift(column) & 15) - 8);
}

// Ids below 0 name those that were chosen; what was chosen from no numbers is -1, and its step goes to waste.
__global__ void embed_kernel(const int32_t* ids, const int32_t* chosen, PackedMatrix w, float* out, int64_t stride) {
  begin_kernel();
  const int given = ids[blockIdx.x];
  const int64_t id = given < 0 ? max(0, chosen[-1 - given]) : given;
  for (int i = int(threadIdx.x); i < w.cols; i += int(blockDim.x)) out[blockIdx.x * stride + i] = packed_at(w, 0, id, i);
}

DType held_type(DType type) {
  switch (type) {
    case DType::f32: return DType::f32;
    case DType::f16:
    case DType::bf16: return DType::bf16;
    case DType::f8:
    case DType::q4_0: return type;
    case DType::q8_0:
    case DType::q4_1:
    case DType::q4_k:
    case DType::q5_k:
    case DType::q6_k: return DType::q8_0;
    default: require(false, "products with weights of this type"); return type;
  }
}

}  // namespace

Weight CudaDevice::pack(std::span<const Tensor> pieces) {
  require(!pieces.empty(), "products without weights");
  const Tensor& first = pieces[0];
  require(first.rank == 2 || first.rank == 3, "weights that are not [rows, cols] or [n, rows, cols]", first);
  Weight w;
  w.dtype = held_type(first.dtype), w.rows = first.shape[first.rank - 2], w.cols = first.shape[first.rank - 1];
  const DTypeInfo type = info(first.dtype);
  require(w.rows > 0 && w.cols > 0 && w.cols % type.block == 0, "rows of no whole blocks", first);
  for (const Tensor& t : pieces) {
    require(t.dtype == first.dtype && (t.rank == 2 || t.rank == 3) && t.shape[t.rank - 2] == w.rows && t.shape[t.rank - 1] == w.cols &&
                (w.cols == 1 || t.stride[t.rank - 1] == 1),
            "pieces that do not stack", first, t);
    require(t.dtype != DType::f8 || (t.scales && t.contiguous()), "fp8 weights without scales, or with gaps", t);
    w.count += t.rank == 3 ? t.shape[0] : 1;
  }
  PackedMatrix to = packed(w.dtype, w.rows, w.cols);
  w.matrix_bytes = to.matrix_bytes;
  w.owner = std::make_shared<Buffer>(size_t(w.bytes()), memory_);
  to.data = w.data = w.owner->data();

  const int64_t row = row_bytes(first.dtype, w.cols);
  const int64_t rows_at_once = std::min(std::max<int64_t>(int64_t(Staging::turn_bytes) / row / 16 * 16, 16), w.rows);
  int64_t matrix = 0;
  for (const Tensor& t : pieces)
    for (int64_t m = 0; m < (t.rank == 3 ? t.shape[0] : 1); ++m, ++matrix) {
      if (t.scales) {
        const int64_t scales = f8_blocks(w.rows) * f8_blocks(w.cols);
        memory_.upload(t.scales + m * scales, const_cast<std::byte*>(to.scales(matrix, 0)), size_t(scales) * 4);
      }
      for (int64_t from = 0; from < w.rows; from += rows_at_once) {
        // The last rows bring the padding with them.
        const int64_t n = std::min(rows_at_once, w.rows - from), pitch = row_bytes(t.dtype, t.stride[t.rank - 2]);
        const auto* data = static_cast<const std::byte*>(t.data) + (t.rank == 3 ? row_bytes(t.dtype, t.stride[0]) * m : 0) + from * pitch;
        ArenaScope scope(scratch_);
        auto* staged = static_cast<std::byte*>(scratch_.bytes(size_t(n * row)));
        staging_.upload(data, pitch, row, n, staged);
        PackedMatrix part = to;
        part.data += matrix * to.matrix_bytes;
        const int64_t packed_rows = from + n == w.rows ? to.padded_rows() - from : n;
        launch(pack_kernel, dim3(unsigned(ceil_div(to.pitch, 32)), unsigned(ceil_div(packed_rows, 8))), dim3(32, 8), 0, stream_,
               Source{reinterpret_cast<const uint8_t*>(staged), t.dtype, type.block, type.block_bytes, row}, part, int(from));
      }
    }
  return w;
}

void CudaDevice::embed(std::span<const int32_t> ids, const Weight& w, Tensor out) {
  require(w.count == 1 && out.rank == 2 && out.shape[0] == int64_t(ids.size()) && out.shape[1] == w.cols, "this embedding", out);
  for (const int32_t id : ids) require(id >= -choice_.count && id < w.rows, "an embedding of an id outside the vocabulary");
  if (ids.empty()) return;
  ArenaScope scope(scratch_);
  launch(embed_kernel, unsigned(ids.size()), 256, 0, stream_, on_gpu(ids), reinterpret_cast<const int32_t*>(choice_.ids.data()), packed(w),
         out.f32(), out.stride[0]);
}

}  // namespace mla::cuda
