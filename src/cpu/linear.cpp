// Products of activations with packed weights: activations are brought into tiles once, then pieces of rows are shared out.
#include "core/check.h"
#include "cpu/cpu.h"
#include "cpu/tiles.h"
#include "cpu/work.h"

#include <vector>

namespace mla {
namespace {

// Activations x[i, h] of tokens i and heads h; strides in elements.
struct Activations {
  const float* x;
  int64_t token, head;
  int64_t n, heads;
};

// y[i, h] = W_h x[i, h] (+ bias) (+ y), in pieces of rows × pieces of tokens.
struct Job {
  const Weight* w;
  PackedShape shape;
  float* y;
  int64_t y_token, y_head;
  const float* bias;
  bool add;
  const std::byte* acts = nullptr;  // [heads][tiles]
  int64_t piece = 0, row_pieces = 0, items = 0;
};

// The activations as the job wants them, in the device's scratch; x itself where it already is a record.
const std::byte* write_acts(CpuDevice& device, const Activations& in, const Job& job) {
  const PackedShape& shape = job.shape;
  const int64_t cols = job.w->cols;
  if (shape.acts.kind == ActKind::f32 && in.n == 1 && in.heads == 1 && cols % act_block == 0)
    return reinterpret_cast<const std::byte*>(in.x);
  const int64_t head_bytes = in.n * shape.token_bytes();
  auto* acts = static_cast<std::byte*>(device.scratch().bytes(size_t(in.heads * head_bytes)));
  auto write = [&](int64_t item, int) {
    const int64_t i = item / in.heads, h = item % in.heads;
    const TokenRecords to = token_records(shape, in.n, i);
    write_records(device.kernels(), shape, to, in.x + i * in.token + h * in.head, cols, shape.blocks, acts + h * head_bytes + to.offset);
  };
  if (in.n * in.heads * cols < 16384)
    for (int64_t item = 0; item < in.n * in.heads; ++item) write(item, 0);
  else
    device.threads().parallel(in.n * in.heads, write);
  return acts;
}

void multiply_piece(CpuDevice& device, const Activations& in, const Job& job, int64_t item, int thread) {
  const PackedShape& shape = job.shape;
  const int64_t across = token_pieces(in.n);
  const int64_t h = item / (job.row_pieces * across), first = item / across % job.row_pieces * job.piece;
  const int64_t groups = std::min(job.piece, shape.groups - first), from = item % across * tokens_per_piece;
  const int64_t rows = std::min(groups * lanes, job.w->rows - first * lanes), stride = results_stride(groups);
  const std::byte* const weights = job.w->data + h * job.w->matrix_bytes + first * shape.group_bytes;
  const bool goes_on = shape.acts.any_tokens && first + groups < shape.groups && from + tokens_per_piece >= in.n;
  const std::byte* const next = goes_on ? weights + groups * shape.group_bytes : nullptr;
  ArenaScope scope(device.scratch(thread));
  float* const out = take_results(device.scratch(thread), groups);
  for_tiles(shape.acts, in.n, from, std::min<int64_t>(in.n, from + tokens_per_piece), [&](int64_t at, int tokens) {
    multiply_tile(shape, {weights, shape.group_bytes, groups, job.acts + (h * in.n + at) * shape.token_bytes(), tokens, shape.units,
                          at == from, next, out, stride});
    for (int t = 0; t < tokens; ++t)
      device.kernels().finish(out + t * stride, job.bias ? job.bias + first * lanes : nullptr, job.add, rows,
                              job.y + (at + t) * job.y_token + h * job.y_head + first * lanes);
  });
}

// All jobs in one loop over the threads; those that want the same activations share them.
void multiply(CpuDevice& device, const Activations& in, std::span<Job> jobs) {
  if (in.n == 0) return;
  ArenaScope scope(device.scratch());
  const int64_t across = token_pieces(in.n);
  int64_t items = 0, groups = 0;
  // Pieces of many tokens are work, too, where a piece is so soon done that rows in larger ones pay.
  for (const Job& job : jobs) groups += job.shape.groups * in.heads * (job.shape.acts.any_tokens ? across : 1);
  for (Job& job : jobs) {
    CHECK(job.shape.product, "no products with {} weights", info(job.w->dtype).name);
    for (const Job* other = jobs.data(); other != &job; ++other)
      if (other->shape.acts == job.shape.acts && other->shape.blocks == job.shape.blocks) job.acts = other->acts;
    if (!job.acts) job.acts = write_acts(device, in, job);
    job.piece = groups_per_piece(job.shape.acts, groups, job.shape.group_bytes, in.n, device.threads().count());
    job.row_pieces = (job.shape.groups + job.piece - 1) / job.piece;
    job.items = in.heads * job.row_pieces * across;
    items += job.items;
  }
  share_out(device.threads(), items, [&](int64_t item, int thread) {
    const Job* job = jobs.data();
    for (; item >= job->items; ++job) item -= job->items;
    multiply_piece(device, in, *job, item, thread);
  });
}

}  // namespace

void CpuDevice::linear(Tensor x, std::span<const Projection> projections) {
  std::vector<Job> jobs;
  jobs.reserve(projections.size());
  for (const Projection& p : projections) {
    CHECK(
        x.rank == 2 && p.y.rank == 2 && p.w.count == 1 && x.shape[1] == p.w.cols && p.y.shape[1] == p.w.rows && x.shape[0] == p.y.shape[0],
        "product of {} with [{}, {}] into {}", mla::describe(x), p.w.rows, p.w.cols, mla::describe(p.y));
    CHECK(!p.bias.data || p.bias.count() == p.w.rows, "bias {} for {} rows", mla::describe(p.bias), p.w.rows);
    jobs.push_back({&p.w, {kernels_, activations, p.w}, p.y.f32(), p.y.stride[0], 0, p.bias.data ? p.bias.f32() : nullptr, p.add});
  }
  multiply(*this, {x.f32(), x.stride[0], 0, x.shape[0], 1}, jobs);
}

void CpuDevice::linear_heads(Tensor x, const Weight& w, Tensor y) {
  CHECK(x.rank == 3 && y.rank == 3 && x.shape[1] == w.count && y.shape[1] == w.count && x.shape[2] == w.cols && y.shape[2] == w.rows &&
            x.shape[0] == y.shape[0],
        "products of {} with {} × [{}, {}] into {}", mla::describe(x), w.count, w.rows, w.cols, mla::describe(y));
  Job job{&w, {kernels_, activations, w}, y.f32(), y.stride[0], y.stride[1], nullptr, false};
  multiply(*this, {x.f32(), x.stride[0], x.stride[1], x.shape[0], w.count}, std::span(&job, 1));
}

}  // namespace mla
