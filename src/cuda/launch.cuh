// Launches kernels so that each may take its place while the one before it ends. Every kernel launched this way calls
// wait_previous_kernel() before it reads or writes what another may have touched; what it does before that (loading weights) overlaps.
#pragma once

#include "cuda/error.h"
#include "cuda/hopper.h"
#include "cuda/ptx.cuh"
#include "cuda/sizes.h"

#include <utility>

namespace mla::cuda {

// Blocks whose x numbers are neighbours, `cluster` at a time, run together and reach each other's shared memory; on Hopper alone.
template <class... P, class... A>
void launch_clusters(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // Without leave a kernel has 48 KB, what it declares statically included; none declares more than 16.
  if (shared_bytes > size_t(32) << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster), attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes, config.numAttrs = !hopper() ? 0 : cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(arguments))...));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... arguments) {
  launch_clusters(1, kernel, grid, block, shared_bytes, stream, std::forward<A>(arguments)...);
}

// A kernel's first lines: the one before has ended, the next may come. In this order the next knows, before it waits, that all but this one
// have ended. In the other, `next_at_once`, the next may ask for its weights while this one still waits, and knows of no kernel before it
// that it has ended.
__device__ inline void begin_kernel(bool next_at_once = false) {
  if (next_at_once) start_next_kernel();
  wait_previous_kernel();
  if (!next_at_once) start_next_kernel();
}

// How a multiprocessor's memory should be divided, in percent of the 228 KB that blocks can share on Hopper (rounded down; the driver takes
// the next larger division), for two blocks that take so much. All ask for 64 KB at least: one that is divided otherwise has to be idle
// first.
inline int shared_percent(size_t block_bytes) {
  constexpr size_t others = 2560;  // the system's and what kernels declare
  for (const int kb : {64, 100, 132, 164, 196})
    if (2 * (block_bytes + others) <= size_t(kb) << 10) return kb * 100 / 228;
  return cudaSharedmemCarveoutMaxShared;
}

}  // namespace mla::cuda
