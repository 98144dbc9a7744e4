// Products of many rows with bf16 weights, and what of the others is not in files of their own.
#include "cuda/product_gemm.cuh"

namespace mla::cuda {
namespace {

__global__ void rows_kernel(Rows x, int n, int cols, int pitch, __nv_bfloat16* to) {
  begin_kernel();
  const int i = int(blockIdx.x), head = int(blockIdx.y);
  const float* from = static_cast<const float*>(x.data) + (x.index ? x.index[i] : i) * x.row + head * x.head;
  auto pair = [&](int c) {
    if (c >= cols) return float2{};
    const float* at = from + code_column(c);
    return reinterpret_cast<uintptr_t>(from) % 8 == 0 ? *reinterpret_cast<const float2*>(at) : float2{at[0], at[1]};
  };
  __nv_bfloat16* out = to + (int64_t(head) * n + i) * pitch;
  for (int c = int(threadIdx.x) * 4; c < pitch; c += int(blockDim.x) * 4) {
    if (x.code_order) {
      const float2 a = pair(c), b = pair(c + 2);
      *reinterpret_cast<__nv_bfloat162*>(out + c) = __floats2bfloat162_rn(a.x, a.y);
      *reinterpret_cast<__nv_bfloat162*>(out + c + 2) = __floats2bfloat162_rn(b.x, b.y);
      continue;
    }
    float v[4];
    const bool aligned = c + 4 <= cols && (reinterpret_cast<uintptr_t>(from + c) & 15) == 0;
    if (aligned)
      *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(from + c);
    else
      for (int j = 0; j < 4; ++j) v[j] = c + j < cols ? from[c + j] : 0;
    *reinterpret_cast<__nv_bfloat162*>(out + c) = __floats2bfloat162_rn(v[0], v[1]);
    *reinterpret_cast<__nv_bfloat162*>(out + c + 2) = __floats2bfloat162_rn(v[2], v[3]);
  }
}

}  // namespace

void product_gemm(const Product& p, const GemmInput& in, cudaStream_t stream) {
  require(p.parts == 1 && !p.choice, "a product of these weights by the matrix units");
  switch (p.part[0].w.type) {
    case DType::bf16: return run_gemm<DType::bf16>(p, in, stream);
    case DType::f8: return product_gemm_f8(p, in, stream);
    case DType::q8_0: return product_gemm_q8_0(p, in, stream);
    case DType::q4_0: return product_gemm_q4_0(p, in, stream);
    default: require(false, "a product of weights of this type by the matrix units");
  }
}

void rows_to_bf16(const Rows& x, int n, int heads, int cols, int pitch, void* to, cudaStream_t stream) {
  require(!x.bf16 && pitch % 4 == 0 && (!x.code_order || cols % 32 == 0), "this conversion");
  launch(rows_kernel, dim3(unsigned(n), unsigned(heads)), unsigned(pitch >= 1024 ? 256 : 64), 0, stream, x, n, cols, pitch,
         static_cast<__nv_bfloat16*>(to));
}

}  // namespace mla::cuda
