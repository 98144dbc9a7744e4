// What the GPU does at best, measured.
#pragma once

#include <cuda_runtime.h>

namespace mla::cuda {

double probe_read(cudaStream_t stream, double seconds);  // GB/s of a read of 2 GB
double probe_bf16(cudaStream_t stream, double seconds);  // GFLOP/s of matrix products of 8192³ by product_gemm

}  // namespace mla::cuda
