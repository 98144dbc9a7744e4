// Joins the partial results of split sequences, a monoid over (output, log-sum): 16 rows a block.
#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int teams = 8, merge_rows = 16;  // a block joins 16 rows, as a warp of the decode kernel holds them

// weight[piece][row] of rows [first, first + 16); the block at the first columns stores the rows' sums.
__device__ void weigh(const DecodeCall& call, const DecodePartials& partial, const DecodeMerge& merge, int first, float* weight) {
  const int64_t pitch = int64_t(call.plan.row_blocks) * block_rows;
  const int lane = int(threadIdx.x);
  for (int r = int(threadIdx.y); r < merge_rows && first + r < merge.rows; r += teams) {
    const float* lse = partial.lse + merge.slot * pitch + first + r;
    float top = -INFINITY, total = 0;
    for (int i = lane; i < merge.pieces; i += 32) top = fmaxf(top, weight[i * merge_rows + r] = lse[i * pitch]);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float base = top == -INFINITY ? 0 : top;
    for (int i = lane; i < merge.pieces; i += 32) total += exp2f(weight[i * merge_rows + r] - base);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    const float scale = total > 0 ? 1 / total : 0;
    for (int i = lane; i < merge.pieces; i += 32) weight[i * merge_rows + r] = scale * exp2f(weight[i * merge_rows + r] - base);
    if (blockIdx.x == 0 && lane == 0)
      call.lse[int64_t(merge.start) * call.n_h + first + r] = total > 0 ? (top + log2f(total)) * ln_2 : -INFINITY;
  }
}

__device__ void store_pair(const DecodeCall& call, int64_t at, float x, float y) {
  if (call.out_f32)
    *reinterpret_cast<float2*>(static_cast<float*>(call.o) + at) = {x, y};
  else
    *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(call.o) + at) = bf16_pair(x, y);
}

__device__ float4 widen(const uint2& x) {
  auto pair = [](const uint32_t& y) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&y)); };
  const float2 upper = pair(x.x), lower = pair(x.y);
  return {upper.x, upper.y, lower.x, lower.y};
}

// The sum over every teams-th piece of a lane's four results; `o` is its place in the first piece.
__device__ float4 weighted_sum(const uint2* o, int64_t pitch, const float* weight, int team, int pieces) {
  float4 sum{};
#pragma unroll 4
  for (int i = team; i < pieces; i += teams) {
    const float4 x = widen(o[i * pitch]);
    const float upper = weight[i * merge_rows], lower = weight[i * merge_rows + 8];
    sum.x += upper * x.x, sum.y += upper * x.y, sum.z += lower * x.z, sum.w += lower * x.w;
  }
  return sum;
}

// Weights of few pieces for rows r and r + 8, in registers: every thread works them out for itself, while its results are on their way.
struct FewWeights {
  static constexpr int most = 8;
  float upper[most], lower[most];

  __device__ FewWeights(const float* lse, int64_t pitch, int pieces, float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      upper[i] = i < pieces ? lse[i * pitch] : -INFINITY;
      lower[i] = i < pieces ? lse[i * pitch + 8] : -INFINITY;
    }
    sum[0] = normalise(upper), sum[1] = normalise(lower);
  }

  // Returns the logarithm of the sum, base 2.
  __device__ static float normalise(float (&w)[most]) {
    float top = -INFINITY, total = 0;
#pragma unroll
    for (const float x : w) top = fmaxf(top, x);
    const float base = top == -INFINITY ? 0 : top;
#pragma unroll
    for (float& x : w) total += x = exp2f(x - base);
    const float scale = total > 0 ? 1 / total : 0;
#pragma unroll
    for (float& x : w) x *= scale;
    return total > 0 ? top + log2f(total) : -INFINITY;
  }
};

// Where a lane's four results of columns [8 eight, 8 eight + 8) are in a merge's first piece.
__device__ const uint2* results(const DecodeCall& call, const DecodePartials& partial, const DecodeMerge& merge, int first, int eight) {
  const int d_v = call.kv.format.layout.d_v, eights = d_v / 16;
  return partial.o + partial_at(call.plan, merge.slot, first / block_rows, eight / eights, d_v) + eight % eights * 128 +
         first % block_rows / merge_rows * 32 + threadIdx.x;
}

__device__ void store_four(const DecodeCall& call, const DecodeMerge& merge, int row, int eight, const float4& x) {
  const int d_v = call.kv.format.layout.d_v;
  const int64_t at = (int64_t(merge.start) * call.n_h + row) * d_v + eight * 8 + (threadIdx.x & 3) * 2;
  if (row < merge.rows) store_pair(call, at, x.x, x.y);
  if (row + 8 < merge.rows) store_pair(call, at + 8 * d_v, x.z, x.w);
}

__global__ void __launch_bounds__(32 * teams) merge_few_kernel(const DecodeCall call, const DecodePartials partial) {
  const DecodeMerge merge = call.plan.merge[blockIdx.y];  // the plan is older than the kernel that is waited for
  const int first = int(blockIdx.z) * merge_rows, d_v = call.kv.format.layout.d_v, row = first + int(threadIdx.x) / 4;
  begin_kernel(true);
  if (first >= merge.rows) return;
  const int64_t lse_pitch = int64_t(call.plan.row_blocks) * block_rows, pitch = lse_pitch * d_v / 4;
  const int step = int(gridDim.x) * teams;
  int eight = int(blockIdx.x * teams + threadIdx.y);
  uint2 x[FewWeights::most];
  auto load = [&] {
    const uint2* o = results(call, partial, merge, first, eight);
#pragma unroll
    for (int i = 0; i < FewWeights::most; ++i) x[i] = i < merge.pieces ? o[i * pitch] : uint2{};
  };
  load();  // before the weights, which take as long to come
  float sum[2];
  const FewWeights weights(partial.lse + merge.slot * lse_pitch + row, lse_pitch, merge.pieces, sum);
  while (true) {
    float4 all{};
#pragma unroll
    for (int i = 0; i < FewWeights::most; ++i) {
      const float4 y = widen(x[i]);
      all.x += weights.upper[i] * y.x, all.y += weights.upper[i] * y.y;
      all.z += weights.lower[i] * y.z, all.w += weights.lower[i] * y.w;
    }
    store_four(call, merge, row, eight, all);
    eight += step;
    if (eight >= d_v / 8) break;
    load();
  }
  if (blockIdx.x != 0 || threadIdx.y != 0 || threadIdx.x % 4 != 0) return;
  for (int i = 0; i < 2; ++i)
    if (row + 8 * i < merge.rows) call.lse[int64_t(merge.start) * call.n_h + row + 8 * i] = sum[i] * ln_2;
}

// The teams share the pieces of the same columns.
__global__ void __launch_bounds__(32 * teams) merge_many_kernel(const DecodeCall call, const DecodePartials partial) {
  extern __shared__ float weight[];  // [pieces, 16]
  __shared__ float4 sums[teams][32];
  const DecodeMerge merge = call.plan.merge[blockIdx.y];
  const int first = int(blockIdx.z) * merge_rows, d_v = call.kv.format.layout.d_v, lane = int(threadIdx.x), team = int(threadIdx.y);
  begin_kernel(true);
  if (first >= merge.rows) return;
  weigh(call, partial, merge, first, weight);
  __syncthreads();
  const int64_t pitch = int64_t(call.plan.row_blocks) * block_rows * d_v / 4;
  for (int eight = int(blockIdx.x); eight < d_v / 8; eight += int(gridDim.x)) {
    float4 sum = weighted_sum(results(call, partial, merge, first, eight), pitch, weight + lane / 4, team, merge.pieces);
    sums[team][lane] = sum;
    __syncthreads();
    for (int i = 1; i < teams && team == 0; ++i) {
      const float4 x = sums[i][lane];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    __syncthreads();
    if (team == 0) store_four(call, merge, first + lane / 4, eight, sum);
  }
}

}  // namespace

size_t decode_scratch_bytes(int slots, int row_blocks, int d_v) {
  return size_t(slots) * size_t(row_blocks) * block_rows * size_t(2 * d_v + 4);
}

void merge_decode(const DecodeCall& call, DecodePartials partial, int d_v, cudaStream_t stream) {
  // Three blocks fill a multiprocessor's shared memory, so that they do not crowd on those that are idle first.
  constexpr int shared_bytes = 74 << 10;
  const bool few = call.plan.most_pieces <= FewWeights::most;
  const int weights = few ? 0 : call.plan.most_pieces * merge_rows * 4, eights = d_v / 8;
  require(weights <= shared_bytes && eights % teams == 0, "more pieces or fewer columns than a merge takes");
  auto kernel = few ? merge_few_kernel : merge_many_kernel;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  // The division of memory that the decode kernel left, so that no multiprocessor waits to be divided anew.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  constexpr int enough_blocks = 384;  // to fill the GPU; a block weighs its pieces once for all its columns
  const int tall = (call.plan.most_rows + merge_rows - 1) / merge_rows, wanted = enough_blocks / (call.plan.merges * tall);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::clamp(wanted, 1, few ? eights / teams : eights)), unsigned(call.plan.merges), unsigned(tall));
  config.blockDim = dim3(32, teams);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, call, partial));
}

}  // namespace mla::cuda
