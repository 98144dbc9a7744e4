// Barriers in shared memory, the copy engine and ordering: the PTX that Hopper's kernels are made of.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace mla::cuda {

// Code that also runs on GPUs before Hopper is compiled a second time: without clusters (their blocks are alone) and early launches.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool has_clusters = false;
#else
constexpr bool has_clusters = true;
#endif

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A barrier that `count` arrivals and the bytes it was told to expect complete; its phases alternate in parity, beginning with 0.
__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The loop is within the instruction, so that the compiler sees no branch between matrix products.
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

// Named barriers among `threads` threads of a block; 0 is __syncthreads'.
__device__ inline void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Makes ordinary writes to shared memory visible to matrix products and the copy engine; every writer calls it before its barrier.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies the box of `map` at (x, y, z) to shared memory and tells the barrier its bytes.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
               : "memory");
}
// The same for `bytes` that lie together, a multiple of 16.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Copies 4, 8 or 16 bytes by a thread; `copied_arrive` then arrives at the barrier for it, once all its copies are there.
template <int Bytes>
__device__ inline void copy_small(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes) : "memory");
}
__device__ inline void copied_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Boxes and bytes with a policy for the second-level cache.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], "
      "%6;" ::"r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}
// By which what is read is the first to go again; or keeps its place in the order, as without a policy (evict_normal is slower for shared
// tiles).
__device__ inline uint64_t cache_policy(bool first_to_go) {
  uint64_t first, same;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(same));
  return first_to_go ? first : same;
}
__device__ inline void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Brings the cache line of an address into the second-level cache.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// True in one lane of a warp whose lanes all come here, the same one each time. The compiler knows it, and keeps what the lane hands to the
// copy engine where that reads it.
__device__ inline bool elect_lane() {
  int is = 0;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; @p mov.s32 %0, 1;}" : "+r"(is));
  return is;
}

// Moves registers between warpgroups; all of a warpgroup calls it.
template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// The kernel launched behind this one may take its place on the multiprocessors, once every block has said so or ended.
__device__ inline void start_next_kernel() {
  if constexpr (has_clusters) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// In a kernel that was launched while the one before it ran: waits until that has finished and its writes are visible.
__device__ inline void wait_previous_kernel() {
  if constexpr (has_clusters) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Waits for all threads of the cluster's blocks that have not ended; what they wrote to shared memory is visible then.
__device__ inline void cluster_sync() {
  if constexpr (has_clusters) asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Reads where block `rank` of the cluster has what this block has at `address` in its shared memory.
__device__ inline float4 cluster_read(uint32_t address, int rank) {
  float4 x{};
  if constexpr (has_clusters)
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address), "r"(rank)
                 : "memory");
  return x;
}

// Adds up what up to 8 blocks of the cluster have there, in their order; all reads are on their way before the first is used.
__device__ inline float4 cluster_sum(uint32_t address, int blocks) {
  constexpr int most = 8;
  float4 part[most];
#pragma unroll
  for (int b = 0; b < most; ++b)
    if (b < blocks) part[b] = cluster_read(address, b);
  float4 sum{};
#pragma unroll
  for (int b = 0; b < most; ++b)
    if (b < blocks) sum.x += part[b].x, sum.y += part[b].y, sum.z += part[b].z, sum.w += part[b].w;
  return sum;
}

}  // namespace mla::cuda
