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

// A kernel's first lines: the one before has ended, the next may come. In this order a kernel that runs knows that all but the one
// before it have ended.
__device__ inline void begin_kernel() {
  wait_previous_kernel();
  start_next_kernel();
}

}  // namespace mla::cuda
