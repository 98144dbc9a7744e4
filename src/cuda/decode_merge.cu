// Joins the partial results of split sequences, a monoid over (output, log-sum): a block joins 16 rows of some columns, which lie together.
#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int most_warps = MergeShape::most_warps, o_bytes = MergeShape::o_bytes, lse_bytes = MergeShape::lse_bytes;

extern __shared__ __align__(128) uint8_t merge_memory[];

__device__ void add_weighted(float2& sum, float weight, uint32_t pair) {
  const float2 x = widen_pair(pair);
  sum.x += weight * x.x, sum.y += weight * x.y;
}

// What warps that share columns hand to one another: of each, its rows' largest log-sum and the sum of their weights, and the weighted sums
// of a lane: columns c and c + 1, c + 8 and c + 9 of row r, then of row r + 8.
struct Shares {
  float top[most_warps][slab_rows], total[most_warps][slab_rows];
  float2 sum[most_warps][4][32];
};

// A warp's pieces; `o` is the lane's place in the first, `lse` its row r there.
__device__ void join_pieces(const uint4* o, const float* lse, int pieces, Shares& shares) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & 31;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float2 sum[4] = {};
#pragma unroll 4
  for (int i = 0; i < pieces; ++i)
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], lse[i * slab_rows + 8 * r]);
#pragma unroll 2
  for (int i = 0; i < pieces; ++i) {
    const uint4 x = o[i * 32];
    const float upper = rescale(lse[i * slab_rows], top[0]), lower = rescale(lse[i * slab_rows + 8], top[1]);
    total[0] += upper, total[1] += lower;
    add_weighted(sum[0], upper, x.x), add_weighted(sum[1], upper, x.y), add_weighted(sum[2], lower, x.z), add_weighted(sum[3], lower, x.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) shares.sum[warp][i][lane] = sum[i];
  for (int r = 0; r < 2 && lane % 4 == 0; ++r) shares.top[warp][lane / 4 + 8 * r] = top[r], shares.total[warp][lane / 4 + 8 * r] = total[r];
}

// Joins the shares of a team's warps, from `warp` on, for the i-th pair of a lane; divides and stores.
__device__ void join_shares(const Shares& shares, int warp, int team, int i, const DecodeCall& call, const DecodeMerge& merge, int slab,
                            int sixteen) {
  const int lane = int(threadIdx.x) & 31, row = lane / 4 + i / 2 * 8, at_row = slab * slab_rows + row;
  float top = -INFINITY, total = 0;
  float2 sum{};
#pragma unroll 4
  for (int t = 0; t < team; ++t) top = fmaxf(top, shares.top[warp + t][row]);
#pragma unroll 2
  for (int t = 0; t < team; ++t) {
    const float w = rescale(shares.top[warp + t][row], top);
    const float2 x = shares.sum[warp + t][i][lane];
    total += w * shares.total[warp + t][row], sum.x += w * x.x, sum.y += w * x.y;
  }
  if (at_row >= merge.rows) return;
  const float scale = total > 0 ? 1 / total : 0;
  const int64_t place = int64_t(merge.start) * call.n_h + at_row;
  const int64_t at = place * call.kv.format.layout.d_v + sixteen * 16 + i % 2 * 8 + lane % 4 * 2;
  if (call.out_f32)
    *reinterpret_cast<float2*>(static_cast<float*>(call.o) + at) = {sum.x * scale, sum.y * scale};
  else
    *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(call.o) + at) = bf16_pair(sum.x * scale, sum.y * scale);
  if (sixteen == 0 && i % 2 == 0 && lane % 4 == 0) call.lse[place] = total > 0 ? (top + log2f(total)) * ln_2 : -INFINITY;
}

// Blocks: some sixteens of columns, the merges, the slabs. Every warp fetches its pieces for itself.
__global__ void __launch_bounds__(32 * most_warps) merge_kernel(const DecodeCall call, const DecodePartials partial, int team) {
  __shared__ uint64_t here[most_warps];
  __shared__ Shares shares;
  const DecodeMerge merge = call.plan.merge[blockIdx.y];  // the plan is older than the kernel that is waited for
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & 31, slab = int(blockIdx.z);
  const int first = int(blockIdx.x) * (warps / team), each = (merge.pieces + team - 1) / team, begin = warp % team * each;
  const int pieces = max(0, min(each, merge.pieces - begin));
  if (lane == 0) {
    barrier_init(&here[warp], 1);
    barrier_init_done();
  }
  __syncwarp();
  begin_kernel(true);
  if (slab * slab_rows >= merge.rows) return;
  uint8_t* o = merge_memory + warp * each * (o_bytes + lse_bytes);
  auto* lse = reinterpret_cast<float*>(o + each * o_bytes);
  if (lane == 0 && pieces > 0) {
    const int sixteen = first + warp / team, d_v = call.kv.format.layout.d_v;
    barrier_expect(&here[warp], pieces * (o_bytes + lse_bytes));
    copy_bytes(lse, partial.lse + partial_lse_at(call.plan, merge, begin, slab), pieces * lse_bytes, &here[warp]);
    copy_bytes(o, partial.o + partial_at(call.plan, merge, begin, slab, sixteen, d_v), pieces * o_bytes, &here[warp]);
  }
  if (pieces > 0) barrier_wait(&here[warp], 0);
  join_pieces(reinterpret_cast<const uint4*>(o) + lane, lse + lane / 4, pieces, shares);
  __syncthreads();
  for (int job = warp; job < warps / team * 4; job += warps)
    join_shares(shares, job / 4 * team, team, job % 4, call, merge, slab, first + job / 4);
}

}  // namespace

size_t decode_scratch_bytes(int slots, int most_rows, int d_v) {
  return size_t(slots) * size_t(slabs_of(most_rows)) * slab_rows * size_t(2 * d_v + 4);
}

void merge_decode(const DecodeCall& call, DecodePartials partial, int d_v, cudaStream_t stream) {
  const DeviceDecodePlan& plan = call.plan;
  constexpr int processors = 132;  // of Hopper's larger GPUs; others take their blocks in other rounds
  const MergeShape shape = merge_shape(plan.merges, plan.most_pieces, plan.most_rows, d_v, processors);
  require(shape.bytes() <= MergeShape::most_bytes, "more pieces than a merge takes");
  // So much memory that they do not crowd on the multiprocessors that are idle first.
  const int rounds = std::clamp((shape.blocks + processors - 1) / processors, 1, 3), room = (220 << 10) / rounds - (16 << 10);
  // The division of memory that the decode kernel left, so that no multiprocessor waits to be divided anew.
  check(cudaFuncSetAttribute(merge_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  launch(merge_kernel, dim3(unsigned(d_v / 16 * shape.team / shape.warps), unsigned(plan.merges), unsigned(slabs_of(plan.most_rows))),
         dim3(unsigned(32 * shape.warps)), size_t(std::max(room, shape.bytes())), stream, call, partial, shape.team);
}

}  // namespace mla::cuda
