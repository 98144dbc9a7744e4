// Asks the GPU once.
#include "cuda/hopper.h"

#include "core/check.h"
#include "cuda/error.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace mla::cuda {
namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

bool hopper() {
  static const bool is = [] {
    const char* forced = std::getenv("MLA_CUDA");
    if (forced && std::string_view(forced) != "portable") fail_input("MLA_CUDA is '{}'; it may be portable, or not set", forced);
    return !forced && attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  }();
  return is;
}

int processors() {
  static const int count = attribute(cudaDevAttrMultiProcessorCount);
  return count;
}

size_t most_shared_bytes() {
  constexpr int declared = 16 << 10;  // at most
  static const int most = std::min(200 << 10, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - declared);
  return size_t(most);
}

}  // namespace mla::cuda
