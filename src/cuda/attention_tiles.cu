// Attention by tensor cores with an online softmax: a block has 128 query rows of one cache head, a warp 16 of them; keys and values come
// in tiles of 64 rows, the next tile while this one is multiplied. Scores never leave the registers.
#include "cuda/attention.h"

#include <algorithm>

namespace mla::cuda {
namespace {

constexpr int warps = 8, threads = 32 * warps, block_rows = 16 * warps, tile = 64;
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// Rows in shared memory are 16 bytes longer than they need be, so that eight of them begin in different banks.
template <int D_k, int D_v>
struct TileShape {
  static constexpr int k_pitch = D_k + 8, v_pitch = D_v + 8;  // elements
  static constexpr int k_bytes = tile * k_pitch * 2, v_bytes = tile * v_pitch * 2;
  static constexpr int shared_bytes = 2 * (k_bytes + v_bytes);
};

__device__ void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 × 8 matrices; lane l names row l % 8 of matrix l / 8.
template <bool Transposed>
__device__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// 16 bytes, or zeros.
__device__ void copy_piece(uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ uint32_t pair(float x, float y) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&p);
}

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

extern __shared__ __align__(16) uint8_t tiles_memory[];

// Starts the copy of cache rows [first, first + 64); rows from `end` on become zeros.
template <int D_k, int D_v>
__device__ void fetch(const AttentionCall& c, const GpuSpan& span, int head, int first, int end, int stage) {
  using S = TileShape<D_k, D_v>;
  const uint32_t k = shared_address(tiles_memory + stage * (S::k_bytes + S::v_bytes)), v = k + S::k_bytes;
  const bool one_page = span.kv_count <= c.page_tokens;
  auto row_at = [&](int j) {
    const int page = one_page ? 0 : j / c.page_tokens;
    return c.base + int64_t(page_of(c, span, page)) * c.page_bytes + int64_t(j - page * c.page_tokens) * c.format.row_bytes;
  };
  auto part = [&](uint32_t to, int pitch, int columns, int offset) {
    const int pieces = columns / 8;
    for (int i = int(threadIdx.x); i < tile * pieces; i += threads) {
      const int r = i / pieces, piece = i % pieces, j = first + r;
      const bool there = j < end;
      copy_piece(to + uint32_t((r * pitch + piece * 8) * 2), there ? row_at(j) + (offset + piece * 8) * 2 : c.base, there);
    }
  };
  part(k, S::k_pitch, D_k, head * D_k);
  part(v, S::v_pitch, D_v, c.format.heads * D_k + head * D_v);
  asm volatile("cp.async.commit_group;");
}

template <int D_k, int D_v>
__global__ void __launch_bounds__(threads, 1) tiles_kernel(const __grid_constant__ AttentionCall c) {
  using S = TileShape<D_k, D_v>;
  begin_kernel();
  const GpuSpan span = span_of(c, int(blockIdx.z));
  const int group = c.n_h / c.format.heads, rows = span.count * group;
  const int block = int(gridDim.x - 1 - blockIdx.x) * block_rows;  // the longest first
  const int head = int(blockIdx.y), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (block >= rows) return;
  const int first_token = block / group, last_token = min(span.count - 1, (block + block_rows - 1) / group);
  const int begin = first_seen(c, span, span.position + first_token) / tile * tile, end = end_seen(c, span, span.position + last_token);
  if (begin < end) fetch<D_k, D_v>(c, span, head, begin, end, 0);

  // This lane's two rows, 8 apart.
  int seen_from[2], seen_to[2];
  int64_t q_at[2];
  bool there[2];
  uint32_t q[D_k / 16][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = block + warp * 16 + lane / 4 + 8 * i, token = min(r / group, span.count - 1);
    there[i] = r < rows;
    q_at[i] = (int64_t(span.start) + token) * c.q_row + (head * group + r % group) * c.q_head;
    seen_from[i] = first_seen(c, span, span.position + token), seen_to[i] = there[i] ? end_seen(c, span, span.position + token) : 0;
  }
  const float scale = c.scale * log2_e;
#pragma unroll
  for (int k = 0; k < D_k / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 x{};
      if (there[i % 2]) x = *reinterpret_cast<const float2*>(c.q + q_at[i % 2] + k * 16 + i / 2 * 8 + lane % 4 * 2);
      q[k][i] = pair(x.x * scale, x.y * scale);
    }

  float o[D_v / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  int stage = 0;
  for (int first = begin; first < end; first += tile, stage ^= 1) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    if (first + tile < end) fetch<D_k, D_v>(c, span, head, first + tile, end, stage ^ 1);
    const uint32_t k_at = shared_address(tiles_memory + stage * (S::k_bytes + S::v_bytes)), v_at = k_at + S::k_bytes;

    float s[tile / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D_k / 16; ++k)
#pragma unroll
      for (int n = 0; n < tile / 16; ++n) {
        uint32_t b[4];
        const int row = n * 16 + lane / 16 * 8 + lane % 8, column = k * 16 + lane / 8 % 2 * 8;
        load_matrices<false>(b, k_at + uint32_t((row * S::k_pitch + column) * 2));
        multiply(s[2 * n], q[k], b[0], b[1]);
        multiply(s[2 * n + 1], q[k], b[2], b[3]);
      }
    const bool masked = first + tile > min(seen_to[0], seen_to[1]) || first < max(seen_from[0], seen_from[1]);
    if (masked) {
#pragma unroll
      for (int n = 0; n < tile / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = first + n * 8 + lane % 4 * 2 + i % 2;
          if (j < seen_from[i / 2] || j >= seen_to[i / 2]) s[n][i] = -INFINITY;
        }
    }
    uint32_t p[tile / 16][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < tile / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float factor = m[i] == top ? 1 : exp2_fast(m[i] - top), base = top == -INFINITY ? 0 : top;
      m[i] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < tile / 8; ++n) {
        const float x = exp2_fast(s[n][2 * i] - base), y = exp2_fast(s[n][2 * i + 1] - base);
        sum += x + y;
        p[n / 2][n % 2 * 2 + i] = pair(x, y);
      }
      l[i] = l[i] * factor + sum;
#pragma unroll
      for (int n = 0; n < D_v / 8; ++n) o[n][2 * i] *= factor, o[n][2 * i + 1] *= factor;
    }
#pragma unroll
    for (int k = 0; k < tile / 16; ++k)
#pragma unroll
      for (int n = 0; n < D_v / 16; ++n) {
        uint32_t b[4];
        const int row = k * 16 + lane % 16, column = n * 16 + lane / 16 * 8;
        load_matrices<true>(b, v_at + uint32_t((row * S::v_pitch + column) * 2));
        multiply(o[2 * n], p[k], b[0], b[1]);
        multiply(o[2 * n + 1], p[k], b[2], b[3]);
      }
  }

  float before[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    l[i] += __shfl_xor_sync(~0u, l[i], 1);
    l[i] += __shfl_xor_sync(~0u, l[i], 2);
    const int r = block + warp * 16 + lane / 4 + 8 * i;
    before[i] = c.merge && there[i] ? c.lse[(span.start + r / group) * c.lse_row + (head * group + r % group) * c.lse_head] : -INFINITY;
  }
  __syncwarp();  // a row's four lanes have read its sum
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!there[i]) continue;
    const int r = block + warp * 16 + lane / 4 + 8 * i;
    const int64_t token = int64_t(span.start) + r / group, at = head * group + r % group;
    float lse = l[i] > 0 ? (m[i] + log2f(l[i])) * ln_2 : -INFINITY, own = 1, other = 0;
    if (c.merge) merge_weights(lse, before[i], own, other);
    if (lane % 4 == 0) c.lse[token * c.lse_row + at * c.lse_head] = lse;
    const float scale_own = l[i] > 0 ? own / l[i] : 0;
    float* to = c.o + token * c.o_row + at * c.o_head + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D_v / 8; ++n) {
      float2 y{o[n][2 * i] * scale_own, o[n][2 * i + 1] * scale_own};
      if (other > 0) {
        const float2 old = *reinterpret_cast<const float2*>(to + n * 8);
        y.x += other * old.x, y.y += other * old.y;
      }
      *reinterpret_cast<float2*>(to + n * 8) = y;
    }
  }
}

template <int D_k, int D_v>
void run(const AttentionCall& c, cudaStream_t stream) {
  const int rows = c.spans.most_queries * (c.n_h / c.format.heads);
  launch(tiles_kernel<D_k, D_v>, dim3(unsigned(ceil_div(rows, block_rows)), unsigned(c.format.heads), unsigned(c.spans.count)), threads,
         TileShape<D_k, D_v>::shared_bytes, stream, c);
}

struct Instance {
  int d_k, d_v;
  void (*run)(const AttentionCall&, cudaStream_t);
};
constexpr Instance instances[] = {{192, 128, run<192, 128>}, {128, 128, run<128, 128>}, {64, 64, run<64, 64>}, {96, 64, run<96, 64>}};

}  // namespace

bool attend_tiles_takes(const KvFormat& f) {
  if (f.type != DType::bf16 || f.layout.v_in_k) return false;
  return std::any_of(std::begin(instances), std::end(instances),
                     [&](const Instance& i) { return i.d_k == f.layout.d_k && i.d_v == f.layout.d_v; });
}

void attend_tiles(const AttentionCall& c, cudaStream_t stream) {
  for (const Instance& i : instances)
    if (i.d_k == c.format.d_k && i.d_v == c.format.d_v) return i.run(c, stream);
  require(false, "attention of heads this wide by tensor cores");
}

}  // namespace mla::cuda
