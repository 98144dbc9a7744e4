// Turns CUDA's error codes into Error, for files that nvcc compiles: it cannot read fmt's headers.
#pragma once

#include <cuda_runtime.h>

namespace mla::cuda {

void check(cudaError_t code);
void require(bool condition, const char* what);

}  // namespace mla::cuda
