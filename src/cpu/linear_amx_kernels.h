// Products with bf16 weights on the tiles of AMX. Both factors lie in memory as tiles: 32 columns of a group of weights, and a block of up
// to 16 tokens. A row of a tile's product depends on no other row, and every number of tokens goes this way, so that results do not depend
// on the batch here either.
#pragma once

#include "cpu/amx.h"
#include "cpu/linear_kernels.h"

#include <algorithm>
#include <bit>

namespace mla {
namespace {

constexpr int tile_rows = 16, set_tokens = 2 * tile_rows;
constexpr int64_t tile_record = 64, tile_bytes = tile_rows * tile_record, tile_lines = tile_bytes / 64;

// The registers of a tile of tokens. Those of a set share one for their activations, and weights have one: a register in use takes one of
// the physical ones that a core's two hardware threads share, and what is left bounds how many instructions are under way. Where the other
// thread has tiles in use, two sums with four registers are nearly twice as fast as four sums with eight, a load more for two products
// included; where it has none, nearly as fast.
template <int sums_at, int acts_at>
struct TokenTile {
  static constexpr int sums = sums_at, acts = acts_at;
};
using First = TokenTile<0, 2>;
using Second = TokenTile<1, 2>;
using Last = TokenTile<4, 5>;  // of as many rows as tokens are left
constexpr int weights_tile = 3;

// What will be met in a while, brought into the second-level cache a few lines at a time.
struct LinesAhead {
  const std::byte* at;  // null for none
  int64_t lines;

  [[gnu::always_inline]] void fetch() {
    if (!at) return;
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += 64 * lines;
  }
};

// Weights that come once and in order: those a little further on, those of the next piece at the end.
struct StreamAhead {
  const Product& p;

  [[gnu::always_inline]] void fetch(const std::byte* weights) { ahead_of<1>(p, weights, weights).fetch(tile_bytes, 0); }
};
// Weights that wait in a cache: the next stretch's, and the activations of the next set.
struct StretchAhead {
  LinesAhead weights, acts;

  [[gnu::always_inline]] void fetch(const std::byte*) { weights.fetch(), acts.fetch(); }
};

// Up to 32 tokens: their records of a unit of 32 columns, `step` bytes before those of the next, and their results.
struct TokenSet {
  int64_t tokens, step;
  const std::byte* acts;
  float* out;
};
inline TokenSet set_at(const Product& p, int64_t set, int64_t unit) {
  const int64_t first = set * set_tokens, tokens = std::min<int64_t>(set_tokens, p.tokens - first), step = tokens * tile_record;
  return {tokens, step, p.acts + first * p.units * tile_record + unit * step, p.out + first * p.stride};
}

// The products of a set's tiles with some units of a group; the sums go on from `out`, or begin.
template <class... Tile, class Ahead>
inline void multiply_units(TokenSet set, const std::byte* weights, int64_t units, bool begin, int64_t stride, Ahead ahead) {
  const int64_t out_step = stride * int64_t(sizeof(float));
  auto each_tile = [](auto f) {
    int64_t i = 0;
    (f(Tile(), i++), ...);
  };
  each_tile([&]<class T>(T, int64_t i) {
    if (begin)
      zero_tile<T::sums>();
    else
      load_tile_at<T::sums>(set.out + i * tile_rows * stride, out_step);
  });
  for (int64_t u = 0; u < units; ++u, weights += tile_bytes, set.acts += set.step) {
    load_tile_at<weights_tile>(weights, tile_record);
    each_tile([&]<class T>(T, int64_t i) {
      load_tile_at<T::acts>(set.acts + i * tile_bytes, tile_record);
      dot_tiles_bf16<T::sums, T::acts, weights_tile>();
    });
    ahead.fetch(weights);
  }
  each_tile([&]<class T>(T, int64_t i) { store_tile_at<T::sums>(set.out + i * tile_rows * stride, out_step); });
}

// A set meets a stretch of columns, group by group; ahead(g) says what is fetched meanwhile.
template <class AheadOf>
inline void multiply_set(const Product& p, TokenSet set, int64_t from, int64_t units, AheadOf ahead) {
  auto multiply = [&]<class... Tile>(Tile...) {
    for (int64_t g = 0; g < p.groups; ++g, set.out += lanes)
      multiply_units<Tile...>(set, p.weights + g * p.group_bytes + from * tile_bytes, units, from == 0, p.stride, ahead(g));
  };
  // A register of zeros is not in use.
  if (set.tokens == set_tokens) return multiply(First(), Second());
  zero_tile<Second::sums>();
  if (set.tokens > tile_rows) {
    multiply(First(), Last());
  } else {
    zero_tile<First::sums>(), zero_tile<First::acts>();
    multiply(Last());
  }
  zero_tile<Last::sums>(), zero_tile<Last::acts>();
}

// One set passes over the rows as they lie, since they may come from memory. Of more, each meets a stretch of columns before any meets the
// next: a set's activations stay in the first-level cache meanwhile, the stretch's weights in the second, and those of the next stretch
// come there, however many columns there are.
void product_bf16_tiles(const Product& p) {
  constexpr int64_t stretch = 8;
  const auto last = uint8_t(p.tokens % tile_rows ? p.tokens % tile_rows : tile_rows);
  const Tiles registers({tile_rows, tile_rows, tile_rows, tile_rows, last, last, tile_rows, tile_rows});
  const int64_t sets = (p.tokens + set_tokens - 1) / set_tokens;
  if (sets == 1) return multiply_set(p, set_at(p, 0, 0), 0, p.units, [&](int64_t) { return StreamAhead{p}; });
  const int64_t act_lines = (2 * tile_lines + p.groups - 1) / p.groups;  // that a unit brings
  for (int64_t from = 0; from < p.units; from += stretch) {
    const int64_t units = std::min(stretch, p.units - from);
    const bool end = from + units == p.units;
    const std::byte* const next_weights = end ? p.next : p.weights + (from + units) * tile_bytes;
    // The next stretch's lines of a group, and how many of them a set brings beside a group: a part by a power of two, so that they lie in
    // one.
    const int64_t group_lines = std::min(stretch, end ? p.units : p.units - from - units) * tile_lines;
    const int64_t weight_lines = group_lines / int64_t(std::bit_floor(uint64_t(sets)));
    for (int64_t set = 0; set < sets; ++set) {
      const bool more = set + 1 < sets;
      const std::byte* const next_acts = more ? set_at(p, set + 1, from).acts : end ? nullptr : set_at(p, 0, from + units).acts;
      multiply_set(p, set_at(p, set, from), from, units, [&](int64_t g) {
        StretchAhead ahead{};
        const int64_t line = (set * p.groups + g) * weight_lines, group = line / group_lines;
        if (next_weights && group < p.groups)
          ahead.weights = {next_weights + group * p.group_bytes + line % group_lines * 64, (weight_lines + units - 1) / units};
        if (next_acts) ahead.acts = {next_acts + g * units * act_lines * 64, act_lines};
        return ahead;
      });
    }
  }
}

constexpr void add_linear_amx(Kernels& k) {
  k.acts[int(DType::bf16)] = {ActKind::bf16, 0, false, int(tile_record), set_tokens, true};
  k.product[int(DType::bf16)] = product_bf16_tiles;
}

}  // namespace
}  // namespace mla
