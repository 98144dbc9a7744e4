// Gated feed-forward networks and stacks of them: each chosen expert's weights are read once for all its tokens, in two loops over
// the threads, one for gate and up of all experts and one for down; where experts have many tokens, a third adds. A token adds its experts
// in ascending order, so that its result does not depend on the batch.
#include "core/check.h"
#include "cpu/cpu.h"
#include "cpu/tiles.h"
#include "cpu/work.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace mla {
namespace {

// Tokens of the experts, one expert after the other; a place is a token's turn at an expert.
struct Plan {
  struct Expert {
    int64_t expert, first, count;  // places [first, first + count)
    int64_t pieces_before = 0;
  };
  Expert* experts;
  int64_t active;
  int32_t* token;  // [places]
  float* weight;   // [places]
  int64_t places;
  int64_t pieces;  // of at most tokens_per_piece tokens, of all experts
  // Of routed tokens:
  int64_t each = 1;              // places of a token
  int32_t* place = nullptr;      // [tokens, each], ascending, as their experts are
  int32_t* expert_of = nullptr;  // [places], among `experts`

  int64_t average() const { return (places + active - 1) / active; }  // tokens of an expert
};

Plan plan_dense(Arena& arena, int64_t n) {
  Plan plan{static_cast<Plan::Expert*>(arena.bytes(sizeof(Plan::Expert))),
            1,
            static_cast<int32_t*>(arena.bytes(size_t(n) * 4)),
            static_cast<float*>(arena.bytes(size_t(n) * 4)),
            n,
            token_pieces(n)};
  plan.experts[0] = {0, 0, n};
  for (int64_t i = 0; i < n; ++i) plan.token[i] = int32_t(i), plan.weight[i] = 1;
  return plan;
}

Plan plan_routed(Arena& arena, const Routing& routing, int64_t n, int64_t experts) {
  const int64_t k = routing.expert.shape[1], places = n * k;
  Plan plan{static_cast<Plan::Expert*>(arena.bytes(size_t(experts) * sizeof(Plan::Expert))),
            0,
            static_cast<int32_t*>(arena.bytes(size_t(places) * 4)),
            static_cast<float*>(arena.bytes(size_t(places) * 4)),
            places,
            0,
            k,
            static_cast<int32_t*>(arena.bytes(size_t(places) * 4)),
            static_cast<int32_t*>(arena.bytes(size_t(places) * 4))};
  auto* next = static_cast<int64_t*>(arena.bytes(size_t(experts) * 8));
  std::memset(next, 0, size_t(experts) * 8);
  auto expert_of = [&](int64_t p) { return routing.expert.as<int32_t>()[p / k * routing.expert.stride[0] + p % k]; };
  for (int64_t p = 0; p < places; ++p) {
    CHECK(expert_of(p) >= 0 && expert_of(p) < experts, "expert {} of {}", expert_of(p), experts);
    ++next[expert_of(p)];
  }
  for (int64_t e = 0, first = 0; e < experts; ++e) {
    const int64_t count = next[e];
    for (int64_t i = 0; i < count; ++i) plan.expert_of[first + i] = int32_t(plan.active);
    if (count) plan.experts[plan.active++] = {e, first, count, plan.pieces};
    plan.pieces += token_pieces(count);
    next[e] = first;
    first += count;
  }
  for (int64_t p = 0; p < places; ++p) {
    const int64_t place = next[expert_of(p)]++;
    plan.token[place] = int32_t(p / k), plan.place[p] = int32_t(place);
    plan.weight[place] = routing.weight.f32()[p / k * routing.weight.stride[0] + p % k];
  }
  for (int64_t p = 0; p < places; p += k) std::sort(plan.place + p, plan.place + p + k);
  return plan;
}

// The activations of all places, expert by expert in tiles. A routed token that no other goes with uses its own records, so that a decode
// step quantises each token once.
struct Inputs {
  const std::byte* single;  // [n] tokens, each a tile of one; none for many tokens that are not routed
  const std::byte* tiled;   // [places]; none for one token

  const std::byte* tile(const PackedShape& shape, const Plan& plan, int64_t place, int tokens) const {
    return tokens == 1 && single ? single + plan.token[place] * shape.token_bytes() : tiled + place * shape.token_bytes();
  }
};

template <size_t Bytes>
void copy_records_of(const PackedShape& shape, const std::byte* from, std::byte* to, int64_t step) {
  for (int64_t b = 0; b < shape.records(); ++b) std::memcpy(to + b * step, from + size_t(b) * Bytes, Bytes);
}

// From records that lie together to their places in a tile.
void copy_records(const PackedShape& shape, const std::byte* from, std::byte* to, int64_t step) {
  const auto bytes = size_t(shape.acts.block_bytes);
  if (bytes == sizeof(I8Block)) return copy_records_of<sizeof(I8Block)>(shape, from, to, step);
  if (bytes == act_block * 2) return copy_records_of<act_block * 2>(shape, from, to, step);
  for (int64_t b = 0; b < shape.records(); ++b) std::memcpy(to + b * step, from + size_t(b) * bytes, bytes);
}

Inputs write_inputs(CpuDevice& device, const PackedShape& shape, const Plan& plan, const Tensor& x) {
  const int64_t n = x.shape[0], bytes = shape.token_bytes();
  const bool routed = plan.place, alone = n == 1 && plan.active == plan.places;
  const int64_t copies = routed && !alone ? plan.each : 0;
  auto room = [&](int64_t tokens) { return static_cast<std::byte*>(device.scratch().bytes(size_t(tokens * bytes))); };
  std::byte *single = routed || alone ? room(n) : nullptr, *tiled = alone ? nullptr : room(plan.places);
  auto write = [&](int64_t i, int) {
    const TokenRecords records = token_records(shape, single ? 1 : n, single ? 0 : i);
    std::byte* own = single ? single + i * bytes : tiled + records.offset;
    write_records(device.kernels(), shape, records, x.f32() + i * x.stride[0], x.shape[1], shape.blocks, own);
    for (int64_t j = 0; j < copies; ++j) {
      const int64_t place = plan.place[i * plan.each + j];
      const Plan::Expert& expert = plan.experts[plan.expert_of[place]];
      const TokenRecords to = token_records(shape, expert.count, place - expert.first);
      if (expert.count > 1) copy_records(shape, own, tiled + expert.first * bytes + to.offset, to.step);
    }
  };
  if (n * x.shape[1] < 16384)
    for (int64_t i = 0; i < n; ++i) write(i, 0);
  else
    device.threads().parallel(n, write);
  return {single, tiled};
}

// A share of a product's work: some groups of an expert's rows, some of its tokens. Those of the same rows follow each other, so that their
// weights stay in the cache.
struct Piece {
  const Plan::Expert& expert;
  int64_t first, groups;  // of sixteen rows
  int64_t from, to;       // tokens of the expert
};
Piece piece_of(const Plan& plan, int64_t item, int64_t groups, int64_t piece) {
  const int64_t row_pieces = (groups + piece - 1) / piece;
  const Plan::Expert& expert = *std::prev(std::upper_bound(
      plan.experts, plan.experts + plan.active, item, [&](int64_t i, const Plan::Expert& e) { return i < e.pieces_before * row_pieces; }));
  const int64_t across = token_pieces(expert.count), own = item - expert.pieces_before * row_pieces;
  const int64_t first = own / across * piece, from = own % across * tokens_per_piece;
  return {expert, first, std::min(piece, groups - first), from, std::min(expert.count, from + tokens_per_piece)};
}

// What is read behind these rows of weights. A product of many tokens brings it closer all along: only that of an expert's last ones may.
const std::byte* behind(const PackedShape& shape, const Piece& part, const std::byte* weights) {
  return shape.acts.any_tokens && part.to < part.expert.count ? nullptr : weights + part.groups * shape.group_bytes;
}

int64_t groups_of_piece(CpuDevice& device, const PackedShape& shape, const Plan& plan, int64_t group_bytes) {
  const int64_t matrices = shape.acts.any_tokens ? plan.pieces : plan.active;
  return groups_per_piece(shape.acts, shape.groups * matrices, group_bytes, plan.average(), device.threads().count());
}

// hidden = silu(gate x) ⊙ up x, written as the activations of down.
void gate_and_up(CpuDevice& device, const FfnWeights& w, const PackedShape& gate, const PackedShape& up, const PackedShape& down,
                 const Plan& plan, const Inputs& x, const Inputs* x_up, std::byte* hidden) {
  const Kernels& kernels = device.kernels();
  // An even number of groups, so that a piece fills whole blocks of down's activations.
  const int64_t piece = (groups_of_piece(device, gate, plan, gate.group_bytes + up.group_bytes) + 1) / 2 * 2;
  share_out(device.threads(), plan.pieces * ((gate.groups + piece - 1) / piece), [&](int64_t item, int thread) {
    const Piece part = piece_of(plan, item, gate.groups, piece);
    const Plan::Expert& expert = part.expert;
    const int64_t first = part.first, groups = part.groups;
    const int64_t rows = std::min(groups * lanes, w.gate.rows - first * lanes), block = first * lanes / act_block;
    const int64_t stride = results_stride(groups);
    const int64_t blocks = first + groups == gate.groups ? down.blocks - block : groups * lanes / act_block;
    const std::byte* gate_at = w.gate.data + expert.expert * w.gate.matrix_bytes + first * gate.group_bytes;
    const std::byte* up_at = w.up.data + expert.expert * w.up.matrix_bytes + first * up.group_bytes;
    const std::byte* const next = behind(gate, part, gate_at);
    Arena& arena = device.scratch(thread);
    ArenaScope scope(arena);
    float *const g = take_results(arena, groups), *const u = take_results(arena, groups);
    for_tiles(gate.acts, expert.count, part.from, part.to, [&](int64_t at, int tokens) {
      const int64_t place = expert.first + at;
      multiply_tile(gate,
                    {gate_at, gate.group_bytes, groups, x.tile(gate, plan, place, tokens), tokens, gate.units, at == 0, up_at, g, stride});
      multiply_tile(up, {up_at, up.group_bytes, groups, (x_up ? *x_up : x).tile(up, plan, place, tokens), tokens, up.units, at == 0, next,
                         u, stride});
      for (int t = 0; t < tokens; ++t) {
        kernels.silu_mul(g + t * stride, u + t * stride, rows);
        const TokenRecords records = token_records(down, expert.count, at + t);
        write_records(kernels, down, records, g + t * stride, rows, blocks,
                      hidden + expert.first * down.token_bytes() + records.offset + block * records.step);
      }
    });
  });
}

// out[token] += weight · down hidden, where experts have few tokens: a piece reads its rows of every expert.
void down_of_few(CpuDevice& device, const FfnWeights& w, const PackedShape& down, const Plan& plan, const std::byte* hidden,
                 const Tensor& out) {
  const int64_t few = plan.average() <= 4 ? std::min<int64_t>(plan.active, 4) : 1;
  const int64_t piece = groups_per_piece(down.acts, down.groups, down.group_bytes * few, plan.average(), device.threads().count());
  share_out(device.threads(), (down.groups + piece - 1) / piece, [&](int64_t item, int thread) {
    const int64_t first = item * piece, groups = std::min(piece, down.groups - first), stride = results_stride(groups);
    const int64_t rows = std::min(groups * lanes, w.down.rows - first * lanes);
    auto weights_of = [&](int64_t e) { return w.down.data + plan.experts[e].expert * w.down.matrix_bytes + first * down.group_bytes; };
    ArenaScope scope(device.scratch(thread));
    float* const y = take_results(device.scratch(thread), groups);
    for (int64_t e = 0; e < plan.active; ++e) {
      const Plan::Expert& expert = plan.experts[e];
      const std::byte* next = e + 1 < plan.active ? weights_of(e + 1) : weights_of(0) + groups * down.group_bytes;
      for_tiles(down.acts, expert.count, 0, expert.count, [&](int64_t at, int tokens) {
        const int64_t place = expert.first + at;
        multiply_tile(down, {weights_of(e), down.group_bytes, groups, hidden + place * down.token_bytes(), tokens, down.units, at == 0,
                             next, y, stride});
        for (int t = 0; t < tokens; ++t)
          device.kernels().add(y + t * stride, plan.weight[place + t], rows,
                               out.f32() + plan.token[place + t] * out.stride[0] + first * lanes);
      });
    }
  });
}

// The same where they have many: an expert's tokens stay in the second-level cache while its rows pass. If tokens have several places,
// their results wait for each other, for a band of rows at a time, which bounds the memory.
void down_of_many(CpuDevice& device, const FfnWeights& w, const PackedShape& down, const Plan& plan, const std::byte* hidden,
                  const Tensor& out) {
  constexpr int64_t most_waiting = int64_t(64) << 20;
  const bool several = plan.each > 1;
  const int64_t piece = groups_of_piece(device, down, plan, down.group_bytes), group_results = plan.places * lanes * int64_t(sizeof(float));
  const int64_t band = several ? std::max<int64_t>(1, most_waiting / (piece * group_results)) * piece : down.groups;
  const int64_t width = std::min(band, down.groups) * lanes;
  auto* waiting = several ? static_cast<float*>(device.scratch().bytes(size_t(plan.places * width) * sizeof(float))) : nullptr;
  for (int64_t begin = 0; begin < down.groups; begin += band) {
    const int64_t end = std::min(begin + band, down.groups);
    share_out(device.threads(), plan.pieces * ((end - begin + piece - 1) / piece), [&](int64_t item, int thread) {
      const Piece part = piece_of(plan, item, end - begin, piece);
      const Plan::Expert& expert = part.expert;
      const int64_t groups = part.groups, first = begin + part.first, rows = std::min(groups * lanes, w.down.rows - first * lanes),
                    stride = results_stride(groups);
      const std::byte* weights = w.down.data + expert.expert * w.down.matrix_bytes + first * down.group_bytes;
      const std::byte* const next = behind(down, part, weights);
      ArenaScope scope(device.scratch(thread));
      float* const y = take_results(device.scratch(thread), groups);
      for_tiles(down.acts, expert.count, part.from, part.to, [&](int64_t at, int tokens) {
        const int64_t place = expert.first + at;
        multiply_tile(
            down, {weights, down.group_bytes, groups, hidden + place * down.token_bytes(), tokens, down.units, at == 0, next, y, stride});
        for (int t = 0; t < tokens; ++t)
          if (several)
            std::memcpy(waiting + (place + t) * width + part.first * lanes, y + t * stride, size_t(rows) * sizeof(float));
          else
            device.kernels().add(y + t * stride, plan.weight[place + t], rows,
                                 out.f32() + plan.token[place + t] * out.stride[0] + first * lanes);
      });
    });
    if (!several) return;
    const int64_t rows = std::min(end * lanes, w.down.rows) - begin * lanes;
    device.threads().parallel(out.shape[0], [&](int64_t token, int) {
      for (int64_t j = token * plan.each; j < (token + 1) * plan.each; ++j)
        device.kernels().add(waiting + plan.place[j] * width, plan.weight[plan.place[j]], rows,
                             out.f32() + token * out.stride[0] + begin * lanes);
    });
  }
}

}  // namespace

void CpuDevice::ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) {
  const int64_t n = x.shape[0], d = x.shape[1], width = w.gate.rows;
  CHECK(x.rank == 2 && out.rank == 2 && out.shape[0] == n && out.shape[1] == d, "ffn of {} into {}", mla::describe(x), mla::describe(out));
  CHECK(w.gate.cols == d && w.up.cols == d && w.up.rows == width && w.down.rows == d && w.down.cols == width &&
            w.up.count == w.gate.count && w.down.count == w.gate.count,
        "ffn of {} with gate [{}, {}], up [{}, {}], down [{}, {}]", mla::describe(x), width, w.gate.cols, w.up.rows, w.up.cols, w.down.rows,
        w.down.cols);
  CHECK(
      !routing || (routing->expert.shape[0] == n && routing->weight.shape[0] == n && routing->weight.shape[1] == routing->expert.shape[1]),
      "{} tokens routed by {}", n, mla::describe(routing->expert));
  if (n == 0) return;
  ArenaScope scope(scratch_);
  PackedShape gate(kernels_, activations, w.gate), up(kernels_, activations, w.up);
  const PackedShape down(kernels_, activations, w.down);
  // Gate and up of other types want activations of their own, cut into the same tiles.
  const bool same = w.up.dtype == w.gate.dtype;
  if (!same) {
    gate.acts.tile = up.acts.tile = std::min(gate.acts.tile, up.acts.tile);
    gate.acts.any_tokens = up.acts.any_tokens = false;
  }
  const Plan plan = routing ? plan_routed(scratch_, *routing, n, w.gate.count) : plan_dense(scratch_, n);
  if (plan.places == 0) return;
  const Inputs inputs = write_inputs(*this, gate, plan, x);
  const Inputs others = same ? inputs : write_inputs(*this, up, plan, x);
  auto* hidden = static_cast<std::byte*>(scratch_.bytes(size_t(plan.places * down.token_bytes())));
  gate_and_up(*this, w, gate, up, down, plan, inputs, same ? nullptr : &others, hidden);
  constexpr int64_t few = 16;  // a tile of them at most
  (plan.average() > few ? down_of_many : down_of_few)(*this, w, down, plan, hidden, out);
}

}  // namespace mla
