// Splits attention over threads: units of (span, cache head, query rows, piece of the context), then a merge of the pieces in order.
// The split follows from a span's own shape alone, so results depend neither on the batch nor on the number of threads.
#include "cpu/attention.h"

#include "core/check.h"
#include "cpu/cpu.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mla {
namespace {

// Pieces are not shorter than this, so that what a piece costs on top stays small.
constexpr int shortest_piece = 256;
// Units a span is cut into where its queries alone do not give as many.
constexpr int wanted_units = 32;
// In the form "rows" a unit takes cache heads together while their part of a tile fits in the second-level cache.
constexpr int64_t tile_bytes = 128 << 10;

// Query rows of one span that share their pieces of the context.
struct Block {
  const Span* span;
  int head, heads, first, rows;
  bool few;  // form "rows"
  int pieces, piece_rows;
  float* state;  // of the pieces, one after the other; null with one piece
};

struct Call {
  const Tensor& q;
  const Kv& kv;
  Mask mask;
  float scale;
  const Tensor &o, &lse;
  Attend how;
  int group;

  const KvLayout& layout() const { return kv.format.layout; }
  // Floats of the state of one piece of a block.
  int64_t state_size(const Block& b) const {
    return b.few ? b.heads * b.rows * rows_state(layout()) : (b.rows + 15) / 16 * lanes_state(layout());
  }
};

void check(const Call& c, Spans spans) {
  const KvLayout& l = c.layout();
  CHECK(c.q.rank == 3 && c.q.dtype == DType::f32 && c.q.shape[2] == l.d_k && c.q.stride[2] == 1, "q is {}, d_k {}", describe(c.q), l.d_k);
  const int64_t n = c.q.shape[0], n_h = c.q.shape[1];
  CHECK(l.heads > 0 && n_h % l.heads == 0, "{} query heads, {} cache heads", n_h, l.heads);
  CHECK(!l.v_in_k || l.d_v <= l.d_k, "d_v {}, d_k {}", l.d_v, l.d_k);
  CHECK(c.o.rank == 3 && c.o.dtype == DType::f32 && c.o.shape[0] == n && c.o.shape[1] == n_h && c.o.shape[2] == l.d_v && c.o.stride[2] == 1,
        "o is {}, q is {}, d_v {}", describe(c.o), describe(c.q), l.d_v);
  CHECK(c.lse.rank == 2 && c.lse.dtype == DType::f32 && c.lse.shape[0] == n && c.lse.shape[1] == n_h, "lse is {}, q is {}", describe(c.lse),
        describe(c.q));
  for (const Span& s : spans)
    CHECK(s.start >= 0 && s.count >= 0 && s.start + int64_t(s.count) <= n && s.kv_count >= 0 && (s.kv_count == 0 || s.pages),
          "span of {} queries at row {} of {}, {} cache rows", s.count, s.start, n, s.kv_count);
}

void plan_span(const Call& c, const Span& span, int few_rows, std::vector<Block>& blocks) {
  const KvLayout& l = c.layout();
  const int64_t rows = int64_t(span.count) * c.group;
  if (rows == 0) return;
  const bool few = rows <= few_rows;
  const int most = few ? int(rows) : attention_vectors * 16;
  int heads = 1;
  if (few) {
    const int64_t head_bytes = std::max<int64_t>(1, attention_tile * c.kv.format.row_bytes() / l.heads);
    heads = int(std::clamp<int64_t>(tile_bytes / head_bytes, 1, std::min<int64_t>(l.heads, attention_vectors * 16 / rows)));
  }
  const int64_t across = (l.heads + heads - 1) / heads * ((rows + most - 1) / most);
  const int64_t pieces_wanted = std::clamp<int64_t>(wanted_units / across, 1, attention_pieces);
  const int64_t length = std::max<int64_t>(shortest_piece, round_up((span.kv_count + pieces_wanted - 1) / pieces_wanted, attention_tile));
  const int pieces = std::max(1, int((span.kv_count + length - 1) / length));
  // The last query rows see the most of the context: first come those that take longest.
  for (int64_t first = (rows - 1) / most * most; first >= 0; first -= most)
    for (int head = 0; head < l.heads; head += heads)
      blocks.push_back({&span, head, std::min(heads, l.heads - head), int(first), int(std::min<int64_t>(most, rows - first)), few, pieces,
                        int(length), nullptr});
}

void run_piece(CpuDevice& device, const Call& c, const Block& b, int piece, float* state, int thread) {
  Arena& arena = device.scratch(thread);
  ArenaScope scope(arena);
  AttentionUnit u{&c.kv,
                  b.span,
                  c.mask,
                  c.scale,
                  c.q.f32() + b.span->start * c.q.stride[0],
                  c.q.stride[0],
                  c.q.stride[1],
                  c.group,
                  b.head,
                  b.heads,
                  b.first,
                  b.rows,
                  0,
                  0,
                  state,
                  static_cast<std::byte*>(arena.bytes(size_t(attention_scratch(c.layout()))))};
  u.from = int(std::min<int64_t>(b.span->kv_count, int64_t(piece) * b.piece_rows));
  u.to = int(std::min<int64_t>(b.span->kv_count, int64_t(u.from) + b.piece_rows));
  (b.few ? device.kernels().attention.rows : device.kernels().attention.lanes)(u);
}

// Elements [from, to) of the outputs of up to 16 query rows of a block, from `row` on; lse goes to lse_out, or to its place if null.
void finish_group(CpuDevice& device, const Call& c, const Block& b, const float* state, int head, int row, int from, int to,
                  float* lse_out) {
  float *o[16], *lse[16];
  const int rows = b.few ? 1 : std::min(16, b.rows - row);
  for (int i = 0; i < rows; ++i) {
    const int r = b.first + row + i;
    const int64_t token = b.span->start + r / c.group, h = int64_t(head) * c.group + r % c.group;
    o[i] = c.o.f32() + token * c.o.stride[0] + h * c.o.stride[1];
    lse[i] = c.lse.f32() + token * c.lse.stride[0] + h * c.lse.stride[1];
  }
  float now[16];
  const int64_t size = c.state_size(b);
  const float* first = state + (b.few ? ((head - b.head) * b.rows + row) * rows_state(c.layout()) : row / 16 * lanes_state(c.layout()));
  const AttentionFinish f{first, size, b.pieces, rows, from, to, c.how == Attend::merge, o, lse, lse_out ? lse_out : now};
  (b.few ? device.kernels().attention.finish_rows : device.kernels().attention.finish_lanes)(f);
  for (int i = 0; i < rows && !lse_out; ++i) *lse[i] = now[i];
}

void finish_block(CpuDevice& device, const Call& c, const Block& b, const float* state) {
  for (int h = b.head; h < b.head + b.heads; ++h)
    for (int row = 0; row < b.rows; row += b.few ? 1 : 16) finish_group(device, c, b, state, h, row, 0, c.layout().d_v, nullptr);
}

}  // namespace

void cpu_attend(CpuDevice& device, Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) {
  const Call c{q, kv, mask, scale, o, lse, how, int(q.shape[1] / std::max(1, kv.format.layout.heads))};
  check(c, spans);
  std::vector<Block> blocks;
  const AttentionKernels& kernels = device.kernels().attention;
  const int few_rows = kv.format.type == DType::f32 ? kernels.few_rows_f32 : kernels.few_rows_narrow;
  for (const Span& span : spans) plan_span(c, span, few_rows, blocks);

  struct Unit {
    int block, piece;
  };
  std::vector<Unit> units;
  std::vector<int> split;
  ArenaScope scope(device.scratch());
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& b = blocks[i];
    for (int piece = 0; piece < b.pieces; ++piece) units.push_back({int(i), piece});
    if (b.pieces == 1) continue;
    split.push_back(int(i));
    b.state = device.scratch().tensor(DType::f32, {b.pieces, c.state_size(b)}).f32();
  }

  device.threads().parallel(int64_t(units.size()), [&](int64_t i, int thread) {
    const Block& b = blocks[size_t(units[size_t(i)].block)];
    if (b.state) return run_piece(device, c, b, units[size_t(i)].piece, b.state + units[size_t(i)].piece * c.state_size(b), thread);
    ArenaScope own(device.scratch(thread));
    float* state = device.scratch(thread).tensor(DType::f32, {c.state_size(b)}).f32();
    run_piece(device, c, b, 0, state, thread);
    finish_block(device, c, b, state);
  });

  if (!split.empty())
    device.threads().parallel(int64_t(split.size()), [&](int64_t i, int) {
      finish_block(device, c, blocks[size_t(split[size_t(i)])], blocks[size_t(split[size_t(i)])].state);
    });
}

}  // namespace mla
