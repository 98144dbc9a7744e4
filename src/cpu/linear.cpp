// Products of activations with packed weights: activations are brought into tiles once, then pieces of rows are shared out.
#include "core/check.h"
#include "cpu/cpu.h"
#include "cpu/tiles.h"
#include "cpu/work.h"

namespace mla {
namespace {

// y[i, h] = W_h x[i, h] for tokens i and heads h; strides in elements.
struct Job {
  const float* x;
  int64_t x_token, x_head;
  float* y;
  int64_t y_token, y_head;
  int64_t n, heads;
  const float* bias;
  bool add;
};

constexpr int64_t tokens_per_piece = 128;  // a multiple of every tile

// [heads][tiles], in the device's scratch; x itself where it already is a record
const std::byte* write_acts(CpuDevice& device, const PackedShape& shape, const Weight& w, const Job& job) {
  if (shape.acts.kind == ActKind::f32 && job.n == 1 && job.heads == 1 && w.cols % act_block == 0)
    return reinterpret_cast<const std::byte*>(job.x);
  const int64_t head_bytes = job.n * shape.token_bytes();
  auto* acts = static_cast<std::byte*>(device.scratch().bytes(size_t(job.heads * head_bytes)));
  auto write = [&](int64_t item, int) {
    const int64_t i = item / job.heads, h = item % job.heads;
    const TokenRecords to = token_records(shape, job.n, i);
    device.kernels().write_row(shape.acts, job.x + i * job.x_token + h * job.x_head, w.cols, shape.blocks,
                               acts + h * head_bytes + to.offset, to.step);
  };
  if (job.n * job.heads * w.cols < 16384)
    for (int64_t item = 0; item < job.n * job.heads; ++item) write(item, 0);
  else
    device.threads().parallel(job.n * job.heads, write);
  return acts;
}

void multiply(CpuDevice& device, const Weight& w, const Job& job) {
  const PackedShape shape(device.kernels(), w.dtype, w.rows, w.cols);
  CHECK(shape.product, "no products with {} weights", info(w.dtype).name);
  if (job.n == 0) return;
  ArenaScope scope(device.scratch());
  const std::byte* acts = write_acts(device, shape, w, job);

  const int64_t piece = groups_per_piece(shape.groups * job.heads, shape.group_bytes, job.n, device.threads().count());
  const int64_t row_pieces = (shape.groups + piece - 1) / piece, token_pieces = (job.n + tokens_per_piece - 1) / tokens_per_piece;
  share_out(device.threads(), job.heads * row_pieces * token_pieces, [&](int64_t item, int) {
    const int64_t h = item / (row_pieces * token_pieces), first = item / token_pieces % row_pieces * piece;
    const int64_t groups = std::min(piece, shape.groups - first), from = item % token_pieces * tokens_per_piece;
    const int64_t rows = std::min(groups * lanes, w.rows - first * lanes);
    alignas(64) float out[most_tokens * most_groups * lanes];
    for_tiles(job.n, from, std::min(job.n, from + tokens_per_piece), shape.acts.tile, [&](int64_t at, int tokens) {
      const std::byte* tile = acts + (h * job.n + at) * shape.token_bytes();
      shape.product({w.data + h * w.matrix_bytes + first * shape.group_bytes, shape.group_bytes, groups, tile, tokens, shape.units,
                     at == from, nullptr, out, groups * lanes});
      for (int t = 0; t < tokens; ++t)
        device.kernels().finish(out + t * groups * lanes, job.bias ? job.bias + first * lanes : nullptr, job.add, rows,
                                job.y + (at + t) * job.y_token + h * job.y_head + first * lanes);
    });
  });
}

}  // namespace

void CpuDevice::linear(Tensor x, const Weight& w, Tensor bias, Tensor y, bool add) {
  CHECK(x.rank == 2 && y.rank == 2 && w.count == 1 && x.shape[1] == w.cols && y.shape[1] == w.rows && x.shape[0] == y.shape[0],
        "product of {} with [{}, {}] into {}", mla::describe(x), w.rows, w.cols, mla::describe(y));
  CHECK(!bias.data || bias.count() == w.rows, "bias {} for {} rows", mla::describe(bias), w.rows);
  multiply(*this, w, {x.f32(), x.stride[0], 0, y.f32(), y.stride[0], 0, x.shape[0], 1, bias.f32(), add});
}

void CpuDevice::linear_heads(Tensor x, const Weight& w, Tensor y) {
  CHECK(x.rank == 3 && y.rank == 3 && x.shape[1] == w.count && y.shape[1] == w.count && x.shape[2] == w.cols && y.shape[2] == w.rows &&
            x.shape[0] == y.shape[0],
        "products of {} with {} × [{}, {}] into {}", mla::describe(x), w.count, w.rows, w.cols, mla::describe(y));
  multiply(*this, w, {x.f32(), x.stride[0], x.stride[1], y.f32(), y.stride[0], y.stride[1], x.shape[0], w.count, nullptr, false});
}

}  // namespace mla
