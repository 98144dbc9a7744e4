// Tokens of a product cut into tiles: as many as one pass over the weights serves, then ever smaller powers of two.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"

#include <algorithm>

namespace mla {

// What a product needs to know of a weight's shape.
struct PackedShape {
  PackedShape(const Kernels& kernels, DType type, int64_t rows, int64_t cols)
      : acts(kernels.acts[int(type)]),
        product(kernels.product[int(type)]),
        groups(packed_groups(rows)),
        units(packed_units(type, cols)),
        group_bytes(packed_group_bytes(type, cols)),
        blocks(units * (packed_format(type).unit_cols / act_block)) {}

  int64_t token_bytes() const { return blocks * acts.block_bytes; }  // of one token's activations

  ActFormat acts;
  void (*product)(const Product&);
  int64_t groups, units, group_bytes, blocks;
};

// The tile that starts at token `at` of n.
inline int tile_tokens(int64_t n, int64_t at, int most) {
  int tokens = most;
  while (tokens > n - at) tokens /= 2;
  return tokens;
}

// Calls f(first token, tokens) for each tile of [from, to) of n tokens; from and to are multiples of the largest tile, or n.
template <class F>
void for_tiles(int64_t n, int64_t from, int64_t to, int most, F f) {
  for (int64_t at = from; at < to;) {
    const int tokens = tile_tokens(n, at, most);
    f(at, tokens);
    at += tokens;
  }
}

// Where token i of n has its first record, and how far apart its records are; tiles follow each other in memory.
struct TokenRecords {
  int64_t offset, step;
};
inline TokenRecords token_records(const PackedShape& shape, int64_t n, int64_t i) {
  const int most = shape.acts.tile;
  int64_t at = i / most * most;
  int tokens = tile_tokens(n, at, most);
  while (i >= at + tokens) at += tokens, tokens = tile_tokens(n, at, most);
  return {at * shape.token_bytes() + (i - at) * shape.acts.block_bytes, int64_t(tokens) * shape.acts.block_bytes};
}

constexpr int most_groups = 16;  // of one piece of work: its results for a tile of 16 tokens stay in the first-level cache
constexpr int most_tokens = 16;

// Groups in a piece of work. Few tokens: enough bytes for a stream, few enough to end together. Many: what stays in the
// second-level cache while tiles of tokens pass over it. Either way several pieces for each thread.
inline int64_t groups_per_piece(int64_t groups, int64_t group_bytes, int64_t tokens, int threads) {
  const int64_t bytes = tokens <= 4 ? int64_t(48) << 10 : int64_t(192) << 10;
  const int64_t share = std::max<int64_t>(1, groups / (4 * threads));
  return std::clamp<int64_t>(bytes / std::max<int64_t>(1, group_bytes), 1, std::min<int64_t>(share, most_groups));
}

}  // namespace mla
