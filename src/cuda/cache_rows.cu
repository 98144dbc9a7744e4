// Writing rows into the cache, reading them back as f32, and forming the rows of expanded keys and values.
#include "cuda/cache_rows.cuh"
#include "cuda/cuda.h"
#include "cuda/linear.h"
#include "cuda/product_gemv.cuh"

#include <algorithm>

namespace mla::cuda {
namespace {

struct Pages {
  std::byte* base;
  int64_t page_bytes;
  int page_tokens;
};

__device__ void write_plain(DType type, std::byte* row, int e, float x) {
  if (type == DType::f32)
    reinterpret_cast<float*>(row)[e] = x;
  else if (type == DType::f16)
    reinterpret_cast<__half*>(row)[e] = __float2half(x);
  else
    reinterpret_cast<__nv_bfloat16*>(row)[e] = __float2bfloat16(x);
}

// f8_scale of core/dtype.h.
__device__ float f8_unit(float most) { return fminf(__uint_as_float((__float_as_uint(most / 448) + 0x7fffff) & 0x7f800000), 0x1p7f); }

// A row of codes: each group of elements by a warp. x(e) gives element e.
template <class Element>
__device__ void write_codes(const RowFormat& f, std::byte* row, Element x) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  // A key or value of `length` elements at a time, its groups shared out.
  auto quantise = [&](int first, int length, int code, int scale) {
    for (int g = warp; g * f.group < length; g += warps) {
      const int from = g * f.group, n = min(f.group, length - from);
      float most = 0;
      for (int i = lane; i < n; i += 32) most = fmaxf(most, fabsf(x(first + from + i)));
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      const float unit = f.type == DType::f8 ? f8_unit(most) : most / 127, inverse = unit > 0 ? 1 / unit : 0;
      for (int i = lane; i < n; i += 32) {
        const float y = x(first + from + i) * inverse;
        reinterpret_cast<uint8_t*>(row)[code + from + i] =
            f.type == DType::f8 ? __nv_cvt_float_to_fp8(y, __NV_SATFINITE, __NV_E4M3) : uint8_t(max(-127, min(127, __float2int_rn(y))));
      }
      if (lane == 0) reinterpret_cast<float*>(row + f.scale_offset)[scale + g] = unit;
    }
  };
  for (int h = 0; h < f.heads; ++h) {
    const int quantised = f.v_in_k ? f.d_v : f.d_k;
    quantise(h * f.d_k, quantised, h * quantised, h * f.scales_a_key);
    for (int i = quantised + int(threadIdx.x); i < f.d_k; i += int(blockDim.x))
      reinterpret_cast<__nv_bfloat16*>(row + f.kept_offset)[h * (f.d_k - f.d_v) + i - f.d_v] = __float2bfloat16(x(h * f.d_k + i));
    if (!f.v_in_k)
      quantise(f.heads * f.d_k + h * f.d_v, f.d_v, f.heads * f.d_k + h * f.d_v, f.heads * f.scales_a_key + h * f.scales_a_value);
  }
}

__global__ void store_kernel(const float* rows, int64_t stride, const int64_t* slots, RowFormat f, Pages pages) {
  begin_kernel();
  const int64_t slot = slots[blockIdx.x];
  const float* from = rows + blockIdx.x * stride;
  std::byte* to = pages.base + slot / pages.page_tokens * pages.page_bytes + slot % pages.page_tokens * f.row_bytes;
  if (f.coded()) return write_codes(f, to, [from](int e) { return from[e]; });
  for (int e = int(threadIdx.x); e < f.row; e += int(blockDim.x)) write_plain(f.type, to, e, from[e]);
}

// Queries of [n, heads] to be rotated; those of a head lie together.
struct Queries {
  const float* from;
  int64_t from_row, from_head;
  void* to;
  int64_t to_row, to_head;
  int heads;
  bool to_bf16;
};

// A token's latent is normed and its key rotated, both in place and into the cache, by a block; more blocks rotate its queries.
struct LatentsFront {
  static constexpr int threads = gemv_threads, pairs_a_block = 512;
  int tokens;
  float* rows;
  const float* norm;
  float eps;
  int d_c;
  const float* cos_sin;
  bool interleaved;
  const int64_t* slots;
  RowFormat f;
  Pages pages;
  Queries q;

  __host__ __device__ int half() const { return (f.row - d_c) / 2; }
  __host__ __device__ int token_blocks() const { return 1 + (q.heads * half() + pairs_a_block - 1) / pairs_a_block; }
  __host__ __device__ int blocks() const { return tokens * token_blocks(); }
  size_t shared_bytes() const { return 0; }

  __device__ void run(int block, uint8_t*, bool next_at_once) const {
    begin_kernel(next_at_once);
    const int token = block / token_blocks(), part = block % token_blocks();
    const float* angles = cos_sin + int64_t(token) * half() * 2;
    if (part > 0)
      rotate_queries(token, (part - 1) * pairs_a_block, angles);
    else
      store_latent(token, angles);
  }

 private:
  // Pair i's elements.
  __device__ int upper(int i) const { return interleaved ? 2 * i : i; }
  __device__ int lower(int i) const { return interleaved ? 2 * i + 1 : i + half(); }

  __device__ void rotate_queries(int token, int begin, const float* angles) const {
    auto* to = static_cast<std::byte*>(q.to);
    const DType type = q.to_bf16 ? DType::bf16 : DType::f32;
    const int end = min(begin + pairs_a_block, q.heads * half());
    for (int p = begin + int(threadIdx.x); p < end; p += threads) {
      const int i = p % half(), head = p / half();
      const float* from = q.from + token * q.from_row + head * q.from_head;
      const float c = angles[2 * i], s = angles[2 * i + 1], a = from[upper(i)], b = from[lower(i)];
      std::byte* row = to + (token * q.to_row + head * q.to_head) * (q.to_bf16 ? 2 : 4);
      write_plain(type, row, upper(i), a * c - b * s);
      write_plain(type, row, lower(i), a * s + b * c);
    }
  }

  __device__ void store_latent(int token, const float* angles) const {
    __shared__ float part[threads / 32];
    const int thread = int(threadIdx.x);
    float* row = rows + int64_t(token) * f.row;
    const int64_t slot = slots[token];
    std::byte* to = pages.base + slot / pages.page_tokens * pages.page_bytes + slot % pages.page_tokens * f.row_bytes;
    float sum = 0;
    for (int i = thread; i < d_c; i += threads) sum += row[i] * row[i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (thread % 32 == 0) part[thread / 32] = sum;
    __syncthreads();
    sum = 0;
    for (const float p : part) sum += p;
    const float scale = rsqrtf(sum / float(d_c) + eps);
    for (int i = thread; i < d_c; i += threads) {
      const float y = row[i] * scale * norm[i];
      row[i] = y;
      if (!f.coded()) write_plain(f.type, to, i, y);
    }
    for (int i = thread; i < half(); i += threads) {
      const int at = d_c + upper(i), other = d_c + lower(i);
      const float c = angles[2 * i], s = angles[2 * i + 1], a = row[at], b = row[other];
      row[at] = a * c - b * s, row[other] = a * s + b * c;
      if (f.coded()) continue;
      write_plain(f.type, to, at, a * c - b * s);
      write_plain(f.type, to, other, a * s + b * c);
    }
    if (!f.coded()) return;
    __syncthreads();
    write_codes(f, to, [row](int e) { return row[e]; });
  }
};

__global__ void load_kernel(float* rows, int64_t stride, const int32_t* page, int64_t first, RowFormat f, Pages pages) {
  begin_kernel();
  const int64_t j = first + blockIdx.x;
  const std::byte* from = pages.base + int64_t(page[j / pages.page_tokens]) * pages.page_bytes + j % pages.page_tokens * f.row_bytes;
  for (int e = int(threadIdx.x); e < f.row; e += int(blockDim.x)) rows[blockIdx.x * stride + e] = read_element(f, from, e);
}

// kv [n, heads, d_h + d_v] and rotary [n, d_R] to rows [K of all heads | V of all heads], each key [W_UK c ; k_R]. A head of a token a
// warp.
__global__ void expanded_kernel(const float* kv, const float* rotary, int64_t rotary_stride, int d_R, RowFormat f, Pages pages) {
  begin_kernel();
  const int64_t t = blockIdx.x;
  const int lane = int(threadIdx.x), head = int(blockIdx.y * blockDim.y + threadIdx.y), d_h = f.d_k - d_R;
  if (head >= f.heads) return;
  const float* from = kv + (t * f.heads + head) * (d_h + f.d_v);
  std::byte* to = pages.base + t * f.row_bytes;
  for (int i = lane; i < d_h; i += 32) write_plain(f.type, to, head * f.d_k + i, from[i]);
  for (int i = lane; i < d_R; i += 32) write_plain(f.type, to, head * f.d_k + d_h + i, rotary[t * rotary_stride + i]);
  for (int i = lane; i < f.d_v; i += 32) write_plain(f.type, to, f.heads * f.d_k + head * f.d_v + i, from[d_h + i]);
}

void check_rows(const Tensor& rows, const Kv& kv) {
  require(rows.rank == 2 && rows.dtype == DType::f32 && rows.shape[1] == kv.format.layout.row() && rows.stride[1] == 1,
          "rows of this cache", rows);
}

unsigned threads_for(int64_t elements) { return unsigned(std::clamp<int64_t>(round_up(elements, 32), 32, 512)); }

}  // namespace

void CudaDevice::store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) {
  check_rows(rows, kv);
  require(rows.shape[0] == int64_t(slots.size()), "as many rows as slots", rows);
  if (slots.empty()) return;
  ArenaScope scope(scratch_);
  launch(store_kernel, unsigned(slots.size()), threads_for(rows.shape[1]), 0, stream_, rows.f32(), rows.stride[0], on_gpu(slots),
         RowFormat(kv.format), Pages{kv.base, kv.page_bytes, kv.page_tokens});
}

void CudaDevice::store_latents(Tensor rows, Tensor norm, float eps, Tensor cos_sin, bool interleaved, std::span<const int64_t> slots,
                               const Kv& kv, const Absorbed* queries) {
  check_rows(rows, kv);
  const int64_t n = rows.shape[0], d_c = norm.count(), d_R = rows.shape[1] - d_c;
  require(n == int64_t(slots.size()) && d_R >= 0 && d_R % 2 == 0 && cos_sin.count() == n * d_R && cos_sin.contiguous(), "these latents",
          rows, cos_sin);
  if (!rows.contiguous()) return Device::store_latents(rows, norm, eps, cos_sin, interleaved, slots, kv, queries);
  if (n == 0) return;
  ArenaScope scope(scratch_);
  LatentsFront front{int(n),
                     rows.f32(),
                     norm.f32(),
                     eps,
                     int(d_c),
                     cos_sin.f32(),
                     interleaved,
                     on_gpu(slots),
                     RowFormat(kv.format),
                     {kv.base, kv.page_bytes, kv.page_tokens},
                     {}};
  if (!queries) return launch_front(front, stream_);
  const Tensor from = queries->rotary(queries->q, d_R), to = queries->rotary(queries->to, d_R);
  require(from.rank == 3 && to.rank == 3 && from.shape[0] == n && to.shape[0] == n && from.shape[1] == to.shape[1] &&
              from.dtype == DType::f32 && (to.dtype == DType::f32 || to.dtype == DType::bf16) && from.stride[2] == 1 && to.stride[2] == 1,
          "queries to be rotated", from, to);
  front.q = {from.f32(), from.stride[0], from.stride[1], to.data, to.stride[0], to.stride[1], int(from.shape[1]), to.dtype == DType::bf16};
  const Product heads = product_of_heads(queries->latent(queries->q, d_R), queries->w, queries->latent(queries->to, d_R));
  if (n <= few_rows && heads.part[0].w.type != DType::f32 && has_few_columns(heads))
    return launch_gemv<Kind::plain, few_warps>(heads, nullptr, front, stream_);
  launch_front(front, stream_);
  multiply(heads, scratch_, properties_.multiProcessorCount, stream_);
}

void CudaDevice::load(const Kv& kv, const Span& span, int64_t first, Tensor rows) {
  check_rows(rows, kv);
  const int64_t n = rows.shape[0];
  require(first >= 0 && first + n <= span.kv_count, "reading rows that are there", rows);
  if (n == 0) return;
  ArenaScope scope(scratch_);
  const int32_t* pages = inputs_.pages(span.pages, kv.page_tokens);
  if (!pages) pages = on_gpu(std::span(span.pages, size_t(ceil_div(first + n, kv.page_tokens))));
  launch(load_kernel, unsigned(n), threads_for(rows.shape[1]), 0, stream_, rows.f32(), rows.stride[0], pages, first, RowFormat(kv.format),
         Pages{kv.base, kv.page_bytes, kv.page_tokens});
}

void CudaDevice::store_expanded(Tensor kv, Tensor rotary, const Kv& to) {
  const KvLayout& l = to.format.layout;
  const int64_t n = kv.shape[0], d_R = rotary.shape[1], d_h = l.d_k - d_R;
  require(!l.v_in_k && kv.rank == 3 && kv.shape[1] == l.heads && kv.shape[2] == d_h + l.d_v && kv.contiguous() && rotary.rank == 2 &&
              rotary.shape[0] == n && rotary.stride[1] == 1 && n <= to.page_tokens && !to.format.coded(),
          "expanded rows", kv, rotary);
  launch(expanded_kernel, dim3(unsigned(n), unsigned(ceil_div(l.heads, 8))), dim3(32, 8), 0, stream_, kv.f32(), rotary.f32(),
         rotary.stride[0], int(d_R), RowFormat(to.format), Pages{to.base, to.page_bytes, to.page_tokens});
}

}  // namespace mla::cuda
