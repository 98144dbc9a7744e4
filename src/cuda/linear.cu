// Linear projections: which kernel multiplies, and what it needs made ready.
#include "cuda/cuda.h"
#include "cuda/hopper.h"
#include "cuda/linear.h"

#include <algorithm>

namespace mla::cuda {
namespace {

// The widest tile that is more than half full and still gives every multiprocessor work.
int tile_for(const Product& p, int processors) {
  for (const int tile : {256, 128, 64})
    if (p.n > tile / 2 && ceil_div(p.part[0].w.rows, 128) * ceil_div(p.n, tile) * p.matrices >= processors * 3 / 2) return tile;
  return p.n > 32 ? 64 : 32;
}

void check_rows(const Tensor& x, const Tensor& y, const char* what) {
  require(x.dtype == DType::f32 && y.dtype == DType::f32 && x.stride[x.rank - 1] == 1 && y.stride[y.rank - 1] == 1, what, x, y);
}

}  // namespace

bool is_for_gemm(const Product& p, const PackedMatrix& w) {
  const bool few = p.runs ? p.tile <= few_rows : p.most <= few_rows;
  return hopper() && !few && w.type != DType::f32 && (w.type == DType::bf16 || w.cols % 32 == 0);
}

void multiply(const Product& whole, Arena& scratch, int processors, cudaStream_t stream) {
  if (whole.most == 0 || whole.n == 0) return;
  const DType type = whole.part[0].w.type;
  const bool code_order = type != DType::bf16;
  if (type == DType::f32) return product_f32(whole, stream);
  if (!is_for_gemm(whole, whole.part[0].w) || (whole.x.bf16 && whole.x.code_order != code_order)) return product_gemv(whole, stream);
  ArenaScope scope(scratch);
  const int cols = whole.part[0].w.cols, pitch = packed(DType::bf16, 1, cols).pitch;
  const int heads = whole.runs ? 1 : whole.matrices;
  Product p = whole;
  p.parts = 1;
  GemmInput in{whole.x.data, int64_t(whole.n) * heads, int(whole.x.row), 0};
  if (!whole.x.bf16) {
    void* x = scratch.bytes(size_t(in.total) * size_t(pitch) * 2);
    p.x.code_order = code_order;
    rows_to_bf16(p.x, whole.n, heads, cols, pitch, x, stream);
    in.x = x, in.pitch = pitch;
    p.choice_is_old = true;  // rows came between
  }
  for (int i = 0; i < whole.parts; ++i) {
    p.part[0] = whole.part[i];
    in.tile = p.runs ? p.tile : std::min(tile_for(p, processors), p.part[0].up.data ? 128 : 256);
    product_gemm(p, in, stream);
  }
}

void CudaDevice::linear(Tensor x, std::span<const Projection> projections) { project(x, nullptr, 0, projections); }

void CudaDevice::linear_normed(Tensor x, Tensor norm, float eps, Tensor h, std::span<const Projection> projections) {
  // Blocks that multiply few rows norm them for themselves, which is sooner than to wait for another kernel.
  const bool f32 = std::any_of(projections.begin(), projections.end(), [](const Projection& p) { return p.w.dtype == DType::f32; });
  if (f32 || x.rank != 2 || x.shape[0] > few_rows) return Device::linear_normed(x, norm, eps, h, projections);
  require(norm.count() == x.shape[1], "a norm", x, norm);
  project(x, norm.f32(), eps, projections);
}

void CudaDevice::project(Tensor x, const float* norm, float eps, std::span<const Projection> projections) {
  require(x.rank == 2, "a product", x);
  if (x.shape[0] == 0) return;
  ArenaScope scope(scratch_);
  // Products of one type go together, as many as a launch takes.
  std::vector<bool> done(projections.size());
  for (size_t from = 0; from < projections.size(); ++from) {
    if (done[from]) continue;
    Product p{};
    p.x = {x.data, false, x.stride[0], 0, nullptr, norm, eps};
    p.n = p.most = int(x.shape[0]), p.matrices = 1, p.next_at_once = !norm;
    for (size_t i = from; i < projections.size() && p.parts < Product::most_parts; ++i) {
      const Projection& one = projections[i];
      require(
          one.y.rank == 2 && one.w.count == 1 && x.shape[1] == one.w.cols && one.y.shape[1] == one.w.rows && x.shape[0] == one.y.shape[0],
          "a product of these shapes", x, one.y);
      require(!one.bias.data || one.bias.count() == one.w.rows, "a bias of this length", one.bias);
      check_rows(x, one.y, "a product of these types");
      if (done[i] || one.w.dtype != projections[from].w.dtype) continue;
      p.part[p.parts++] = {packed(one.w), {}, {one.y.data, false, one.y.stride[0], 0, one.bias.f32(), one.add}};
      done[i] = true;
    }
    multiply(p, scratch_, properties_.multiProcessorCount, stream_);
  }
}

Product product_of_heads(const Tensor& x, const Weight& w, const Tensor& y) {
  require(x.rank == 3 && y.rank == 3 && x.shape[1] == w.count && y.shape[1] == w.count && x.shape[2] == w.cols && y.shape[2] == w.rows &&
              x.shape[0] == y.shape[0],
          "products of heads of these shapes", x, y);
  const bool narrow = y.dtype == DType::bf16;
  require(x.dtype == DType::f32 && (narrow || y.dtype == DType::f32) && x.stride[2] == 1 && y.stride[2] == 1,
          "products of heads of these types", x, y);
  Product p{};
  p.parts = 1, p.n = p.most = int(x.shape[0]), p.matrices = int(w.count);
  p.part[0] = {packed(w), {}, {y.data, narrow, y.stride[0], y.stride[1], nullptr, false}};
  p.x = {x.data, false, x.stride[0], x.stride[1], nullptr};
  p.next_at_once = true;
  return p;
}

void CudaDevice::linear_heads(Tensor x, const Weight& w, Tensor y) {
  const Product p = product_of_heads(x, w, y);
  ArenaScope scope(scratch_);
  multiply(p, scratch_, properties_.multiProcessorCount, stream_);
}

}  // namespace mla::cuda
