// Joins the partial results of split sequences, a monoid over (output, reference, sum): a team of warps joins 16 rows and 16 columns of
// one, which lie together, each its share of the pieces.
#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"

#include <algorithm>
#include <bit>

namespace mla::cuda {
namespace {

constexpr int most_warps = MergeShape::most_warps, o_bytes = MergeShape::o_bytes, sums_bytes = MergeShape::sums_bytes;
static_assert(sums_bytes == DecodePartials::sums_of_piece * 4);

extern __shared__ __align__(128) uint8_t merge_memory[];

__device__ void add_weighted(float2& sum, float weight, uint32_t pair) {
  const float2 x = widen_pair(pair);
  sum.x += weight * x.x, sum.y += weight * x.y;
}

// What a lane has joined of rows r and r + 8: their largest reference, their sums, and columns c and c + 1, c + 8 and c + 9 of r, then of
// r + 8.
struct Joined {
  float top[2], total[2];
  float2 sum[4];
};

// Joins the first Most of the pieces, if there are so many; `o` is the lane's place in the first, `sums` its row r there. The four lanes of
// a row share out the weights.
template <int Most>
__device__ Joined join_pieces(const uint4* o, const float* sums, int pieces) {
  constexpr int fours = Most / 4;
  const int t = int(threadIdx.x) & 3;
  Joined j{};
  float weight[2][fours], sum[2][fours];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    j.top[r] = -INFINITY;
#pragma unroll
    for (int k = 0; k < fours; ++k) {
      const float *reference = sums + (4 * k + t) * DecodePartials::sums_of_piece + 8 * r, *share = reference + DecodePartials::share;
      const bool is = 4 * k + t < pieces;
      weight[r][k] = is ? *reference : -INFINITY;
      sum[r][k] = is ? share[0] + share[slab_rows] : 0;
      j.top[r] = fmaxf(j.top[r], weight[r][k]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    j.top[r] = quad_max(j.top[r]);
#pragma unroll
    for (int k = 0; k < fours; ++k) weight[r][k] = rescale(weight[r][k], j.top[r]), j.total[r] += weight[r][k] * sum[r][k];
    j.total[r] = quad_sum(j.total[r]);
  }
#pragma unroll
  for (int k = 0; k < fours; ++k) {
    if (4 * k >= pieces) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 x = 4 * k + i < pieces ? o[(4 * k + i) * 32] : uint4{};
      const float upper = __shfl_sync(~0u, weight[0][k], i, 4), lower = __shfl_sync(~0u, weight[1][k], i, 4);
      add_weighted(j.sum[0], upper, x.x), add_weighted(j.sum[1], upper, x.y);
      add_weighted(j.sum[2], lower, x.z), add_weighted(j.sum[3], lower, x.w);
    }
  }
  return j;
}

__device__ Joined join(const Joined& x, const Joined& y) {
  Joined z;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    z.top[r] = fmaxf(x.top[r], y.top[r]);
    const float u = rescale(x.top[r], z.top[r]), v = rescale(y.top[r], z.top[r]);
    z.total[r] = u * x.total[r] + v * y.total[r];
#pragma unroll
    for (int i = 2 * r; i < 2 * r + 2; ++i) z.sum[i] = {u * x.sum[i].x + v * y.sum[i].x, u * x.sum[i].y + v * y.sum[i].y};
  }
  return z;
}

// Where a lane's results go, in a slab and sixteen columns.
struct Place {
  const DecodeCall& call;
  int rows;       // of the sequence, from this lane's row r on
  int64_t row;    // r, of all
  int64_t at;     // c of r, among all results
  bool has_sums;  // this lane stores its rows' log-sums

  __device__ Place(const DecodeCall& c, const DecodeMerge& merge, int slab, int sixteen) : call(c) {
    const int lane = int(threadIdx.x) & 31, in_sequence = slab * slab_rows + lane / 4;
    rows = merge.rows - in_sequence, row = int64_t(merge.start) * c.n_h + in_sequence;
    at = row * c.kv.format.layout.d_v + sixteen * 16 + lane % 4 * 2;
    has_sums = sixteen == 0 && lane % 4 == 0;
  }
  // Divides and stores the i-th pair.
  __device__ void store(int i, float top, float total, float2 sum) const {
    const int down = i / 2 * 8;
    if (down >= rows) return;
    const float scale = total > 0 ? __fdividef(1, total) : 0;
    const int64_t to = at + down * call.kv.format.layout.d_v + i % 2 * 8;
    if (call.out_f32)
      *reinterpret_cast<float2*>(static_cast<float*>(call.o) + to) = {sum.x * scale, sum.y * scale};
    else
      *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(call.o) + to) = bf16_pair(sum.x * scale, sum.y * scale);
    if (has_sums && i % 2 == 0) call.lse[row + down] = total > 0 ? (top + __log2f(total)) * ln_2 : -INFINITY;
  }
};

// What warps hand to one another.
struct Shares {
  float2 row[most_warps][slab_rows];  // the largest reference and the sum
  float2 sum[most_warps][4][32];
};

// Joins the shares of a team's warps, from `warp` on, for the i-th pair of a lane.
template <int Team>
__device__ void join_shares(const Shares& shares, int warp, int i, const Place& place) {
  const int lane = int(threadIdx.x) & 31, row = lane / 4 + i / 2 * 8;
  float top = -INFINITY, total = 0;
  float2 of_row[Team], sum{};
#pragma unroll
  for (int t = 0; t < Team; ++t) of_row[t] = shares.row[warp + t][row], top = fmaxf(top, of_row[t].x);
#pragma unroll
  for (int t = 0; t < Team; ++t) {
    const float w = rescale(of_row[t].x, top);
    const float2 x = shares.sum[warp + t][i][lane];
    total += w * of_row[t].y, sum.x += w * x.x, sum.y += w * x.y;
  }
  place.store(i, top, total, sum);
}

// Blocks: some sixteens of columns, the merges, the slabs. Every warp fetches its pieces for itself.
template <int Team>
__global__ void __launch_bounds__(32 * most_warps)
    merge_kernel(const __grid_constant__ DecodeCall call, const __grid_constant__ DecodePartials partial) {
  __shared__ uint64_t here[most_warps];
  const DecodeMerge merge = call.plan.merge[blockIdx.y];  // the plan is older than the kernel that is waited for
  const int warps = int(blockDim.x) / 32, warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) & 31;
  const int slab = int(blockIdx.z);
  const int sixteen = int(blockIdx.x) * (warps / Team) + warp / Team, member = warp % Team;
  const int each = (merge.pieces + Team - 1) / Team, begin = member * each, pieces = max(0, min(each, merge.pieces - begin));
  uint8_t* o = merge_memory + warp * each * (o_bytes + sums_bytes);
  uint8_t* sums = o + each * o_bytes;
  const uint4* o_from = partial.o + partial_at(call.plan, merge, begin, slab, sixteen, call.kv.format.layout.d_v);
  const float* sums_from = partial.sums + partial_sums_at(call.plan, merge, begin, slab);
  if (lane == 0) {
    barrier_init(&here[warp], 1);
    barrier_init_done();
  }
  __syncwarp();
  begin_kernel(true);
  if (slab * slab_rows >= merge.rows) return;
  if (pieces > 0 && elect_lane()) {
    barrier_expect(&here[warp], pieces * (o_bytes + sums_bytes));
    copy_bytes(sums, sums_from, pieces * sums_bytes, &here[warp]);
    copy_bytes(o, o_from, pieces * o_bytes, &here[warp]);
  }
  const Place place(call, merge, slab, sixteen);
  if (pieces > 0) barrier_wait(&here[warp], 0);
  __syncwarp();
  const auto* o_at = reinterpret_cast<const uint4*>(o) + lane;
  const auto* sums_at = reinterpret_cast<const float*>(sums) + lane / 4;
  constexpr int few = MergeShape::few, many = MergeShape::many;
  Joined j = each <= few ? join_pieces<few>(o_at, sums_at, pieces) : join_pieces<many>(o_at, sums_at, pieces);
  for (int i = many; i < pieces; i += many)
    j = join(j, join_pieces<many>(o_at + i * 32, sums_at + i * DecodePartials::sums_of_piece, pieces - i));
  if constexpr (Team == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) place.store(i, j.top[i / 2], j.total[i / 2], j.sum[i]);
  } else {
    __shared__ Shares shares;
#pragma unroll
    for (int i = 0; i < 4; ++i) shares.sum[warp][i][lane] = j.sum[i];
    if (lane % 4 == 0) shares.row[warp][lane / 4] = {j.top[0], j.total[0]}, shares.row[warp][lane / 4 + 8] = {j.top[1], j.total[1]};
    __syncthreads();
    for (int i = member; i < 4; i += Team) join_shares<Team>(shares, warp - member, i, place);
  }
}

}  // namespace

size_t decode_scratch_bytes(int slots, int most_rows, int d_v) {
  return size_t(slots) * size_t(slabs_of(most_rows)) * (size_t(d_v) / 16 * o_bytes + sums_bytes);
}

void merge_decode(const DecodeCall& call, DecodePartials partial, int d_v, cudaStream_t stream) {
  const DeviceDecodePlan& plan = call.plan;
  const MergeShape shape = merge_shape(plan.merges, plan.most_pieces, plan.most_rows, d_v, processors());
  require(shape.bytes() <= MergeShape::most_bytes, "more pieces than a merge takes");
  constexpr decltype(&merge_kernel<1>) kernels[] = {merge_kernel<1>, merge_kernel<2>, merge_kernel<4>, merge_kernel<8>};
  const auto kernel = kernels[std::countr_zero(unsigned(shape.team))];
  // So much memory that they do not crowd on the multiprocessors that are idle first.
  const int rounds = std::clamp((shape.blocks + processors() - 1) / processors(), 1, 3), room = (220 << 10) / rounds - (16 << 10);
  // The division of memory that the decode kernel left, so that no multiprocessor waits to be divided anew.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  launch(kernel, dim3(unsigned(d_v / 16 * shape.team / shape.warps), unsigned(plan.merges), unsigned(slabs_of(plan.most_rows))),
         dim3(unsigned(32 * shape.warps)), size_t(std::max(room, shape.bytes())), stream, call, partial);
}

}  // namespace mla::cuda
