// What the GPU can do: Hopper's own kernels, or those that run on any since Ampere.
#pragma once

#include <cstddef>

namespace mla::cuda {

// Whether kernels with WGMMA, TMA, clusters and early launches may run. A process's GPUs are of one kind; the environment's
// MLA_CUDA=portable asks for what older and newer ones run. Raises Error for another value.
bool hopper();
int processors();  // multiprocessors

// Shared memory that a block may have beside what it declares.
size_t most_shared_bytes();

}  // namespace mla::cuda
