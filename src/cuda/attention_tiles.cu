// Attention over separate keys and values on Hopper: how it is cut into pieces (attention_tiles.cuh), and how parts of a context are
// joined.
#include "cuda/attention_tiles.cuh"
#include "cuda/tensor_map.h"

#include <algorithm>
#include <numeric>

namespace mla::cuda {
namespace {

// Joins the results of splits of the context: a warp for each query and head. `all` is the call as it came, `part` that of the splits.
__global__ void __launch_bounds__(256)
    join_kernel(const __grid_constant__ AttentionCall all, const __grid_constant__ AttentionCall part, int splits) {
  begin_kernel();
  const GpuSpan span = span_of(all, int(blockIdx.z));
  const int query = int(blockIdx.x), head = int(blockIdx.y * blockDim.y + threadIdx.y), lane = int(threadIdx.x);
  if (query >= span.count || head >= all.n_h) return;
  const int64_t token = span.start + query;
  const float* sums = part.lse + token * part.lse_row + head;
  const float* from = part.o + token * part.o_row + head * part.o_head;
  const float own = lane < splits ? sums[lane * part.split_lse] : -INFINITY;
  float top = own;
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  float weight = own == -INFINITY ? 0 : expf(own - top), total = weight;
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  weight = total > 0 ? weight / total : 0;
  float* sum = all.lse + token * all.lse_row + head * all.lse_head;
  float lse = total > 0 ? top + logf(total) : -INFINITY, mine = 1, other = 0;
  if (all.merge) merge_weights(lse, *sum, mine, other);
  __syncwarp();
  if (lane == 0) *sum = lse;
  float* to = all.o + token * all.o_row + head * all.o_head;
  for (int column = 2 * lane; column < all.format.d_v; column += 64) {
    float2 y{};
#pragma unroll 16
    for (int i = 0; i < splits; ++i) {  // loads wait neither for one another nor for what they are worth
      const float w = __shfl_sync(~0u, weight, i);
      const float2 x = *reinterpret_cast<const float2*>(from + i * part.split_o + column);
      y.x += w > 0 ? w * x.x : 0, y.y += w > 0 ? w * x.y : 0;
    }
    if (all.merge) {
      const float2 before = other > 0 ? *reinterpret_cast<const float2*>(to + column) : float2{};
      y.x = mine * y.x + other * before.x, y.y = mine * y.y + other * before.y;
    }
    *reinterpret_cast<float2*>(to + column) = y;
  }
}

// How many parts the context goes in where there are too few pieces to fill the GPU. Each costs a little; joining has to pay.
int splits_of(const AttentionCall& c, int pieces) {
  constexpr int most = 32;  // a warp's lanes
  const int tiles = int(ceil_div(c.most_seen, tile));
  constexpr double joining = 2.5;  // in tiles
  auto cost = [&](int s) { return double(ceil_div(int64_t(pieces) * s, c.processors)) * (1.0 / s + 0.02) * tiles + (s > 1 ? joining : 0); };
  int best = 1;
  double least = cost(1);
  for (int s = 2; s <= std::min(most, tiles / fewest_split) && pieces < c.processors; ++s)
    if (cost(s) < least) best = s, least = cost(s);
  return best;
}

bool in_one_page(const AttentionCall& c) { return !c.spans.spans && c.one.kv_count <= c.page_tokens; }

template <int D_k, int D_v>
void run(const AttentionCall& c, const TileGrid& grid, cudaStream_t stream) {
  const KvFormat format{{c.format.heads, D_k, D_v, false}, DType::bf16};
  const CUtensorMap map = pages_map(c.base, format.layout.row(), c.page_tokens, format.row_bytes(), c.page_bytes, grid.box_rows);
  const bool many = grid.pieces > c.processors;
  launch(many ? tiles_kernel<D_k, D_v, true> : tiles_kernel<D_k, D_v, false>, unsigned(many ? c.processors : grid.pieces), threads,
         TileShape<D_k, D_v>::shared_bytes, stream, c, map, grid);
}

TileGrid grid_of(const AttentionCall& c) {
  constexpr int64_t section_bytes = 20 << 20;  // of the second-level cache's 50 MB
  const int64_t head_bytes = int64_t(c.most_seen) * (c.format.d_k + c.format.d_v) * 2;
  TileGrid grid{};
  grid.blocks = int(ceil_div(c.spans.most_queries * (c.n_h / c.format.heads), block_rows));
  grid.section = int(std::clamp<int64_t>(section_bytes / std::max<int64_t>(1, head_bytes), 1, c.format.heads));
  grid.box_rows = in_one_page(c) ? tile : std::gcd(c.page_tokens, tile);
  grid.pieces = grid.blocks * c.format.heads * c.spans.count;
  grid.splits = splits_of(c, grid.pieces);
  grid.pieces *= grid.splits;
  return grid;
}

struct Instance {
  int d_k, d_v;
  void (*run)(const AttentionCall&, const TileGrid&, cudaStream_t);
};
constexpr Instance instances[] = {{192, 128, run<192, 128>}, {128, 128, run<128, 128>}, {64, 64, run<64, 64>}, {96, 64, run<96, 64>}};

const Instance* find(const AttentionCall& c) {
  const RowFormat& f = c.format;
  const bool pieces = in_one_page(c) || c.page_tokens % 8 == 0;                                    // of tiles begin where swizzled rows do
  const bool aligned = (reinterpret_cast<uintptr_t>(c.base) | uintptr_t(c.page_bytes)) % 16 == 0;  // for the copy engine
  const bool vectors = (c.q_row | c.q_head) % 4 == 0 && reinterpret_cast<uintptr_t>(c.q) % 16 == 0 && (c.o_row | c.o_head) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(c.o) % 16 == 0;
  if (f.type != DType::bf16 || f.v_in_k || !pieces || !aligned || !vectors) return nullptr;
  for (const Instance& i : instances)
    if (i.d_k == f.d_k && i.d_v == f.d_v) return &i;
  return nullptr;
}

}  // namespace

bool attend_tiles_takes(const AttentionCall& c) { return find(c); }

size_t attend_tiles_scratch_bytes(const AttentionCall& c) {
  const int splits = grid_of(c).splits;
  return splits == 1 ? 0 : size_t(splits) * size_t(c.n) * size_t(c.n_h) * size_t(c.format.d_v + 1) * 4;
}

void attend_tiles(const AttentionCall& c, void* scratch, cudaStream_t stream) {
  const Instance* instance = find(c);
  require(instance, "attention of this kind by matrix units");
  const TileGrid grid = grid_of(c);
  if (grid.splits == 1) return instance->run(c, grid, stream);
  AttentionCall part = c;
  part.merge = false;
  part.o_head = c.format.d_v, part.o_row = c.n_h * part.o_head, part.split_o = c.n * part.o_row;
  part.lse_head = 1, part.lse_row = c.n_h, part.split_lse = c.n * part.lse_row;
  part.o = static_cast<float*>(scratch), part.lse = part.o + grid.splits * part.split_o;
  instance->run(part, grid, stream);
  launch(join_kernel, dim3(unsigned(c.spans.most_queries), unsigned(ceil_div(c.n_h, 8)), unsigned(c.spans.count)), dim3(32, 8), 0, stream,
         c, part, grid.splits);
}

}  // namespace mla::cuda
