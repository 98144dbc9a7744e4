// Turns CUDA's error codes and wrong shapes into Error, for files that nvcc compiles: it cannot read fmt's headers.
#pragma once

#include "core/tensor.h"

#include <cuda_runtime.h>

namespace mla::cuda {

void check(cudaError_t code);
void require(bool condition, const char* what);
// Names the tensors in the message.
void require(bool condition, const char* what, const Tensor& a, const Tensor& b = {});

}  // namespace mla::cuda
