// Prefill on Hopper: attention over separate keys and values with an online softmax. A block has 128 query rows of one cache head. One warp
// copies tiles of 128 keys and values to shared memory; two warpgroups multiply, 64 rows each, and while one multiplies the other takes
// exponentials. Scores never leave the registers.
#include "cuda/attention_rows.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

#include <algorithm>
#include <numeric>

namespace mla::cuda {
namespace {

constexpr int threads = 384, group_rows = 64, block_rows = 2 * group_rows, tile = 128, stages = 2;
constexpr int box_bytes = tile * 128;  // 64 columns of a tile
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// In boxes of 64 columns: the queries, then the stages, each its keys and its values.
template <int D_k, int D_v>
struct TileShape {
  static constexpr int k_boxes = (D_k + 63) / 64, v_boxes = D_v / 64;
  static constexpr int q_bytes = k_boxes * block_rows * 128, stage_bytes = (k_boxes + v_boxes) * box_bytes;
  static constexpr int shared_bytes = q_bytes + stages * stage_bytes + 1024;
  static constexpr int o_registers = D_v / 2;
};

struct TileBarriers {
  uint64_t k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
};

extern __shared__ __align__(1024) uint8_t tiles_memory[];

template <class S>
struct TileMemory {
  __device__ static uint8_t* q() { return tiles_memory; }
  __device__ static uint8_t* k(int stage) { return tiles_memory + S::q_bytes + stage * S::stage_bytes; }
  __device__ static uint8_t* v(int stage) { return k(stage) + S::k_boxes * box_bytes; }
  __device__ static TileBarriers& barriers() {
    return *reinterpret_cast<TileBarriers*>(tiles_memory + S::q_bytes + stages * S::stage_bytes);
  }
};

// How a launch is cut into blocks. Heads go in sections whose keys and values stay in the second-level cache together; within one the
// longest blocks come first.
struct TileGrid {
  int blocks, section;  // blocks of rows of a head, heads of a section
  int box_rows;         // rows that are neighbours in memory wherever a tile is cut
};

__device__ uint32_t pair(float x, float y) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&p);
}

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a block computes: rows [first, first + 128) of (token, head of the group), against cache rows [begin, end) of one head.
struct TileWork {
  GpuSpan span;
  int group, rows, first, head, begin, end;

  __device__ TileWork(const AttentionCall& c, const TileGrid& g) {
    const int section = int(blockIdx.x) / (g.blocks * g.section), at = int(blockIdx.x) % (g.blocks * g.section);
    const int heads = min(g.section, c.format.heads - section * g.section);
    span = span_of(c, int(blockIdx.y));
    head = section * g.section + at % heads;
    group = c.n_h / c.format.heads, rows = span.count * group;
    first = (g.blocks - 1 - at / heads) * block_rows;
    if (first >= rows) return;
    const int last_token = min(span.count - 1, (first + block_rows - 1) / group);
    begin = first_seen(c, span, span.position + first / group) / tile * tile;
    end = end_seen(c, span, span.position + last_token);
  }
  __device__ int tiles() const { return end > begin ? (end - begin + tile - 1) / tile : 0; }
};

// The thread that copies. Rows past the span's last stay as they are in shared memory.
template <class S, int D_k, int D_v>
__device__ void load_tiles(const AttentionCall& c, const CUtensorMap* map, const TileWork& w, int box_rows) {
  constexpr TileMemory<S> memory{};
  TileBarriers& b = memory.barriers();
  auto part = [&](uint64_t* full, uint8_t* to, int boxes, int column, int first) {
    const int pieces = (min(tile, w.span.kv_count - first) + box_rows - 1) / box_rows;
    barrier_expect(full, pieces * boxes * box_rows * 128);
    for (int i = 0; i < pieces; ++i) {
      const int j = first + i * box_rows, page = j / c.page_tokens;
      const int y = j - page * c.page_tokens, z = page_of(c, w.span, page);
      for (int box = 0; box < boxes; ++box) copy_box(to + box * box_bytes + i * box_rows * 128, map, full, column + box * 64, y, z);
    }
  };
  for (int t = 0; t < w.tiles(); ++t) {
    const int stage = t % stages, free = (t / stages & 1) ^ 1, first = w.begin + t * tile;
    barrier_wait(&b.k_empty[stage], free);
    part(&b.k_full[stage], memory.k(stage), S::k_boxes, w.head * D_k, first);
    barrier_wait(&b.v_empty[stage], free);
    part(&b.v_full[stage], memory.v(stage), S::v_boxes, c.format.heads * D_k + w.head * D_v, first);
  }
}

// A warpgroup's thread: its rows are row and row + 8 of the block, its columns 8 i + 2 (lane % 4) + {0, 1}.
template <int D_k, int D_v>
struct TileGroup {
  using S = TileShape<D_k, D_v>;
  static constexpr TileMemory<S> memory{};
  const AttentionCall& c;
  const TileWork& w;
  int index, thread, lane, row;
  int seen_from[2], seen_to[2];
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // reference of the sums, base 2, and this thread's share of them

  __device__ TileGroup(const AttentionCall& call, const TileWork& work, int index_)
      : c(call), w(work), index(index_), thread(int(threadIdx.x) % 128), lane(thread % 32) {
    row = index * group_rows + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = w.span.position + min((w.first + row + 8 * i) / w.group, w.span.count - 1);
      seen_from[i] = first_seen(c, w.span, position);
      seen_to[i] = w.first + row + 8 * i < w.rows ? end_seen(c, w.span, position) : 0;
    }
  }

  __device__ int64_t query_at(int r) const {
    return (int64_t(w.span.start) + r / w.group) * c.q_row + (w.head * w.group + r % w.group) * c.q_head;
  }

  // This warpgroup's queries as bf16 into shared memory.
  __device__ void load_queries() const {
    constexpr int pieces = D_k / 8;
    for (int i = thread; i < group_rows * pieces; i += 128) {
      const int r = i / pieces, piece = i % pieces, at = index * group_rows + r;
      float2 x[4] = {};
      if (w.first + at < w.rows) {
        const auto* from = reinterpret_cast<const float2*>(c.q + query_at(w.first + at) + piece * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = from[j];
      }
      *reinterpret_cast<uint4*>(memory.q() + piece / 8 * (block_rows * 128) + at * 128 + ((piece ^ at) & 7) * 16) = {
          pair(x[0].x, x[0].y), pair(x[1].x, x[1].y), pair(x[2].x, x[2].y), pair(x[3].x, x[3].y)};
    }
    publish_shared();
    named_sync(3 + index, 128);
  }

  // The warpgroups' products take turns, so that one's exponentials fall into the other's.
  __device__ void begin_turn() const { named_sync(1 + index, 256); }
  __device__ void end_turn() const { named_arrive(2 - index, 256); }
  __device__ void free(uint64_t& barrier) const {
    if (lane == 0) barrier_arrive(&barrier);
  }

  // s = Q Kᵀ
  __device__ void scores(float (&s)[tile / 2], int stage) const {
    const uint32_t q = shared_address(memory.q()) + index * group_rows * 128, k = shared_address(memory.k(stage));
#pragma unroll
    for (int i = 0; i < D_k / 16; ++i)
      wgmma<false>(s, wgmma_operand(q + i / 4 * (block_rows * 128) + i % 4 * 32), wgmma_operand(k + i / 4 * box_bytes + i % 4 * 32), i > 0);
    wgmma_commit();
  }
  // o += P V
  __device__ void values(float (&o)[S::o_registers], const uint32_t (&p)[tile / 4], int stage) const {
    const uint32_t v = shared_address(memory.v(stage));
#pragma unroll
    for (int i = 0; i < tile / 16; ++i) wgmma<true>(o, p + 4 * i, wgmma_operand(v + i * 16 * 128, box_bytes), 1);
    wgmma_commit();
  }

  // Zeroes the values of rows that are not the span's: 0 × NaN is NaN. Both warpgroups do, neither waits for the other.
  __device__ void clear_values(int stage, int valid) const {
    if (valid >= tile) return;
    for (int box = 0; box < S::v_boxes; ++box)
      for (int i = valid * 8 + thread; i < tile * 8; i += 128) reinterpret_cast<uint4*>(memory.v(stage) + box * box_bytes)[i] = uint4{};
    publish_shared();
    named_sync(3 + index, 128);
  }

  // The scores of the tile at `first` become probabilities; what was summed before must be multiplied by `factor`.
  __device__ void softmax(float (&s)[tile / 2], int first, float (&factor)[2]) {
    if (first + tile > min(seen_to[0], seen_to[1]) || first < max(seen_from[0], seen_from[1])) {
#pragma unroll
      for (int i = 0; i < tile / 2; ++i) {
        const int j = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (j < seen_from[i / 2 % 2] || j >= seen_to[i / 2 % 2]) s[i] = -INFINITY;
      }
    }
    const float scale = c.scale * log2_e;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < tile / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
      // The reference moves only where a score exceeds it by 2^8: f32 sums and bf16 probabilities are as exact below as at 1.
      const float next = top > m[r] + 8 ? top : m[r], base = next == -INFINITY ? 0 : next;
      factor[r] = m[r] == next ? 1 : exp2_fast(m[r] - next);
      m[r] = next;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < tile / 8; ++i) {
        float &x = s[4 * i + 2 * r], &y = s[4 * i + 2 * r + 1];
        x = exp2_fast(fmaf(x, scale, -base)), y = exp2_fast(fmaf(y, scale, -base));
        sum += x + y;
      }
      l[r] = l[r] * factor[r] + sum;
    }
  }

  __device__ void run(float (&o)[S::o_registers]) {
    TileBarriers& b = memory.barriers();
    const int tiles = w.tiles();
    if (tiles == 0) return;
    if (index == 1) end_turn();  // the first warpgroup begins
    float s[tile / 2], factor[2];
    uint32_t p[tile / 4];
    auto narrow = [&] {
#pragma unroll
      for (int i = 0; i < tile / 4; ++i) p[i] = pair(s[2 * i], s[2 * i + 1]);
    };
    barrier_wait(&b.k_full[0], 0);
    begin_turn();
    wgmma_begin();
    scores(s, 0);
    end_turn();
    wgmma_wait<0>();
    free(b.k_empty[0]);
    softmax(s, w.begin, factor);
    narrow();
    for (int t = 1; t < tiles; ++t) {
      const int stage = t % stages, before = (t - 1) % stages;
      barrier_wait(&b.k_full[stage], t / stages & 1);
      begin_turn();
      wgmma_begin();
      scores(s, stage);
      barrier_wait(&b.v_full[before], (t - 1) / stages & 1);
      wgmma_begin();
      values(o, p, before);
      end_turn();
      wgmma_wait<1>();
      free(b.k_empty[stage]);
      softmax(s, w.begin + t * tile, factor);
      wgmma_wait<0>();
      free(b.v_empty[before]);
      narrow();
      if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (int i = 0; i < S::o_registers; ++i) o[i] *= factor[i / 2 % 2];
      }
    }
    const int stage = (tiles - 1) % stages;
    barrier_wait(&b.v_full[stage], (tiles - 1) / stages & 1);
    clear_values(stage, w.span.kv_count - (w.begin + (tiles - 1) * tile));
    begin_turn();
    wgmma_begin();
    values(o, p, stage);
    end_turn();
    wgmma_wait<0>();
  }
  __device__ void store(const float (&o)[S::o_registers]) {
    float before[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(~0u, l[i], 1);
      l[i] += __shfl_xor_sync(~0u, l[i], 2);
      before[i] = c.merge && there(i) ? c.lse[sum_at(i)] : -INFINITY;
    }
    __syncwarp();  // a row's four lanes have read its sum
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!there(i)) continue;
      float lse = l[i] > 0 ? (m[i] + log2f(l[i])) * ln_2 : -INFINITY, own = 1, other = 0;
      if (c.merge) merge_weights(lse, before[i], own, other);
      if (lane % 4 == 0) c.lse[sum_at(i)] = lse;
      const float scale = l[i] > 0 ? own / l[i] : 0;
      float* to = c.o + token(i) * c.o_row + query_head(i) * c.o_head + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D_v / 8; ++n) {
        float2 y{o[4 * n + 2 * i] * scale, o[4 * n + 2 * i + 1] * scale};
        if (other > 0) {
          const float2 old = *reinterpret_cast<const float2*>(to + n * 8);
          y.x += other * old.x, y.y += other * old.y;
        }
        *reinterpret_cast<float2*>(to + n * 8) = y;
      }
    }
  }

 private:
  // Of this thread's row i.
  __device__ int of_span(int i) const { return w.first + row + 8 * i; }
  __device__ bool there(int i) const { return of_span(i) < w.rows; }
  __device__ int64_t token(int i) const { return int64_t(w.span.start) + of_span(i) / w.group; }
  __device__ int query_head(int i) const { return w.head * w.group + of_span(i) % w.group; }
  __device__ int64_t sum_at(int i) const { return token(i) * c.lse_row + query_head(i) * c.lse_head; }
};

template <int D_k, int D_v>
__global__ void __launch_bounds__(threads, 1)
    tiles_kernel(const __grid_constant__ AttentionCall c, const __grid_constant__ CUtensorMap map, TileGrid grid) {
  using S = TileShape<D_k, D_v>;
  constexpr TileMemory<S> memory{};
  if (threadIdx.x == 256) {
    if (shared_address(tiles_memory) % 1024 != 0) __trap();  // swizzles count from there
    prefetch_map(&map);
    TileBarriers& b = memory.barriers();
    for (int i = 0; i < stages; ++i) {
      barrier_init(&b.k_full[i], 1), barrier_init(&b.v_full[i], 1);
      barrier_init(&b.k_empty[i], 8), barrier_init(&b.v_empty[i], 8);
    }
    barrier_init_done();
  }
  __syncthreads();
  begin_kernel();
  const TileWork w(c, grid);
  if (w.first >= w.rows) return;
  const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  if (group == 2) {
    give_registers<40>();
    if (threadIdx.x == 256) load_tiles<S, D_k, D_v>(c, &map, w, grid.box_rows);
  } else {
    take_registers<232>();
    TileGroup<D_k, D_v> g(c, w, group);
    float o[S::o_registers];
#pragma unroll
    for (float& x : o) x = 0;
    g.load_queries();
    g.run(o);
    g.store(o);
  }
}

bool in_one_page(const AttentionCall& c) { return !c.spans.spans && c.one.kv_count <= c.page_tokens; }

template <int D_k, int D_v>
void run(const AttentionCall& c, cudaStream_t stream) {
  constexpr int64_t section_bytes = 20 << 20;  // of the second-level cache's 50 MB
  const KvFormat format{{c.format.heads, D_k, D_v, false}, DType::bf16};
  const int rows = c.spans.most_queries * (c.n_h / c.format.heads);
  const int64_t head_bytes = int64_t(c.spans.spans ? c.page_tokens : c.one.kv_count) * (D_k + D_v) * 2;
  TileGrid grid{};
  grid.blocks = int(ceil_div(rows, block_rows));
  grid.section = int(std::clamp<int64_t>(section_bytes / std::max<int64_t>(1, head_bytes), 1, c.format.heads));
  grid.box_rows = in_one_page(c) ? tile : std::gcd(c.page_tokens, tile);
  const CUtensorMap map = pages_map(c.base, format.layout.row(), c.page_tokens, format.row_bytes(), c.page_bytes, grid.box_rows);
  launch(tiles_kernel<D_k, D_v>, dim3(unsigned(grid.blocks * c.format.heads), unsigned(c.spans.count)), threads,
         TileShape<D_k, D_v>::shared_bytes, stream, c, map, grid);
}

struct Instance {
  int d_k, d_v;
  void (*run)(const AttentionCall&, cudaStream_t);
};
constexpr Instance instances[] = {{192, 128, run<192, 128>}, {128, 128, run<128, 128>}, {64, 64, run<64, 64>}, {96, 64, run<96, 64>}};

const Instance* find(const AttentionCall& c) {
  const RowFormat& f = c.format;
  const bool pieces = in_one_page(c) || c.page_tokens % 8 == 0;                                    // of tiles begin where swizzled rows do
  const bool aligned = (reinterpret_cast<uintptr_t>(c.base) | uintptr_t(c.page_bytes)) % 16 == 0;  // for the copy engine
  const bool pairs = (c.q_row | c.q_head | c.o_row | c.o_head) % 2 == 0;
  if (f.type != DType::bf16 || f.v_in_k || !pieces || !aligned || !pairs) return nullptr;
  for (const Instance& i : instances)
    if (i.d_k == f.d_k && i.d_v == f.d_v) return &i;
  return nullptr;
}

}  // namespace

bool attend_tiles(const AttentionCall& c, cudaStream_t stream) {
  const Instance* instance = find(c);
  if (instance) instance->run(c, stream);
  return instance;
}

}  // namespace mla::cuda
