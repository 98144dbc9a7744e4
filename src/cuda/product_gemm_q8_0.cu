// Products of many rows with q8_0 weights.
#include "cuda/product_gemm.cuh"

namespace mla::cuda {

void product_gemm_q8_0(const Product& p, const GemmInput& in, cudaStream_t stream) { run_gemm<DType::q8_0>(p, in, stream); }

}  // namespace mla::cuda
