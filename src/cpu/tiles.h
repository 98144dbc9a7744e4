// Tokens of a product cut into tiles: as many as one pass over the weights serves, then those that are left, in one tile or in ever smaller
// powers of two. A tile's activations are [pass][block][token] of records.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "device/device.h"

#include <algorithm>

namespace mla {

// What a product needs to know of a weight's shape.
struct PackedShape {
  PackedShape(const Kernels& kernels, Activations activations, const Weight& w)
      : acts(kernels.acts[int(w.dtype)]),
        product(kernels.product[int(w.dtype)]),
        groups(packed_groups(w.rows)),
        units(packed_units(w.dtype, w.cols)),
        group_bytes(packed_group_bytes(w.dtype, w.cols)),
        blocks(units * (packed_format(w.dtype).unit_cols / act_block)),
        passes(activations == Activations::i16 && (acts.kind == ActKind::i8 || acts.kind == ActKind::i8_affine) ? 2 : 1) {}

  int64_t records() const { return passes * blocks; }  // of one token
  int64_t token_bytes() const { return records() * acts.block_bytes; }

  ActFormat acts;
  void (*product)(const Product&);
  int64_t groups, units, group_bytes, blocks, passes;
};

// The tile that starts at token `at` of n.
inline int tile_tokens(const ActFormat& format, int64_t n, int64_t at) {
  int tokens = format.tile;
  if (format.any_tokens) return int(std::min<int64_t>(tokens, n - at));
  while (tokens > n - at) tokens /= 2;
  return tokens;
}

constexpr int tokens_per_piece = 128;

// Calls f(first token, tokens) for each product of [from, to) of n tokens, of a tile or of those of a piece; from and to are multiples of
// the largest tile, or n.
template <class F>
void for_tiles(const ActFormat& format, int64_t n, int64_t from, int64_t to, F f) {
  for (int64_t at = from; at < to;) {
    const int tokens = format.any_tokens ? int(std::min<int64_t>(tokens_per_piece, to - at)) : tile_tokens(format, n, at);
    f(at, tokens);
    at += tokens;
  }
}

// Where token i of n has its first record, how far apart its records are, and where the second pass has the record of the same block;
// tiles follow each other in memory.
struct TokenRecords {
  int64_t offset, step, second;
};
inline TokenRecords token_records(const PackedShape& shape, int64_t n, int64_t i) {
  int64_t at = i / shape.acts.tile * shape.acts.tile;
  int tokens = tile_tokens(shape.acts, n, at);
  while (i >= at + tokens) at += tokens, tokens = tile_tokens(shape.acts, n, at);
  const int64_t step = int64_t(tokens) * shape.acts.block_bytes;
  return {at * shape.token_bytes() + (i - at) * shape.acts.block_bytes, step, shape.blocks * step};
}

// Writes `cols` floats, a part of a token, as `blocks` records from `to` on; for the second pass what the first rounds off.
inline void write_records(const Kernels& kernels, const PackedShape& shape, const TokenRecords& records, const float* x, int64_t cols,
                          int64_t blocks, std::byte* to) {
  kernels.write_row(shape.acts, x, cols, blocks, to, records.step);
  if (shape.passes == 1) return;
  for (int64_t b = 0; b < blocks; ++b, to += records.step) {
    const auto& block = *reinterpret_cast<const I8Block*>(to);
    float rest[act_block] = {};
    for (int64_t i = 0; i < std::min<int64_t>(act_block, cols - b * act_block); ++i)
      rest[i] = x[b * act_block + i] - block.scale * float(block.code[i]);
    kernels.write_row(shape.acts, rest, act_block, 1, to + records.second, records.step);
  }
}

constexpr int most_groups = 16;  // of one piece of work: its results for a tile of 8 tokens stay in the first-level cache
// Of a piece's results from one token to the next: an odd number of lines, lest those of several tokens meet in the same sets of the cache.
constexpr int64_t results_stride(int64_t groups) { return (groups | 1) * lanes; }
inline float* take_results(Arena& arena, int64_t groups) {
  return static_cast<float*>(arena.bytes(size_t(tokens_per_piece * results_stride(groups)) * sizeof(float)));
}
inline int64_t token_pieces(int64_t tokens) { return (tokens + tokens_per_piece - 1) / tokens_per_piece; }

// The product of a tile, in as many passes as its activations have.
inline void multiply_tile(const PackedShape& shape, const Product& p) {
  shape.product(p);
  if (shape.passes == 1) return;
  alignas(64) float second[8 * results_stride(most_groups)];  // the widest tile of such types
  Product rest = p;
  rest.acts += p.tokens * shape.blocks * shape.acts.block_bytes;
  rest.fetch = false;
  rest.out = second;
  shape.product(rest);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t i = t * p.stride; i < t * p.stride + p.groups * lanes; ++i) p.out[i] += second[i];
}

// Groups in a piece of work. Few tokens: enough bytes for a stream, few enough to end together. Many: what stays in the
// second-level cache while tiles of tokens pass over it. Either way several pieces for each thread.
inline int64_t groups_per_piece(const ActFormat& format, int64_t groups, int64_t group_bytes, int64_t tokens, int threads) {
  // Units that multiply many tokens at once are so fast that it shows how often activations are read; they take a stretch of many columns
  // at a time.
  const bool wide = format.any_tokens && tokens > 16;
  const int64_t bytes = int64_t(wide ? 512 : tokens > 4 ? 192 : 48) << 10, most = wide ? 64 << 10 : group_bytes;
  const int64_t share = std::max<int64_t>(1, groups / (4 * threads));
  return std::clamp<int64_t>(bytes / std::clamp<int64_t>(group_bytes, 1, most), 1, std::min<int64_t>(share, most_groups));
}

}  // namespace mla
