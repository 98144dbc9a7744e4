// Products of many rows with f8 weights.
#include "cuda/product_gemm.cuh"

namespace mla::cuda {

void product_gemm_f8(const Product& p, const GemmInput& in, cudaStream_t stream) { run_gemm<DType::f8>(p, in, stream); }

}  // namespace mla::cuda
