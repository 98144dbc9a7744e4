// Errors of the GPU in words.
#include "cuda/error.h"

#include "core/check.h"

namespace mla::cuda {

void check(cudaError_t code) {
  if (code != cudaSuccess) fail("the GPU reports: {} ({})", cudaGetErrorString(code), cudaGetErrorName(code));
}

void require(bool condition, const char* what) { CHECK(condition, "{}", what); }

}  // namespace mla::cuda
