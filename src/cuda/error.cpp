// Errors of the GPU in words.
#include "cuda/error.h"

#include "core/check.h"

namespace mla::cuda {

void check(cudaError_t code) {
  if (code != cudaSuccess) fail("the GPU reports: {} ({})", cudaGetErrorString(code), cudaGetErrorName(code));
}

void require(bool condition, const char* what) {
  if (!condition) fail("the GPU cannot run {}", what);
}

void require(bool condition, const char* what, const Tensor& a, const Tensor& b) {
  if (!condition) fail("the GPU cannot run {}: {}{}{}", what, describe(a), b.rank ? ", " : "", b.rank ? describe(b) : "");
}

}  // namespace mla::cuda
