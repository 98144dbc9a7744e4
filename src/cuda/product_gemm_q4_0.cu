// Products of many rows with q4_0 weights.
#include "cuda/product_gemm.cuh"

namespace mla::cuda {

void product_gemm_q4_0(const Product& p, const GemmInput& in, cudaStream_t stream) { run_gemm<DType::q4_0>(p, in, stream); }

}  // namespace mla::cuda
