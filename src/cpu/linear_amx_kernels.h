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

constexpr int tile_rows = 16;
constexpr int64_t tile_record = 64, tile_bytes = tile_rows * tile_record, tile_lines = tile_bytes / 64;
constexpr int acts_tile = 4;  // the first of two

// Two tiles of tokens meet two groups, so that each load serves two products; up to 16 tokens meet four. Either way four sums are under
// way, which hides the latency of a product.
constexpr int sums_tile(int a, int g) { return 2 * a + g; }
template <int A>
constexpr int weights_tile(int g) {
  return A == 2 ? 6 + g : 5 + g % 3;
}

// f(0), f(1) … f(n - 1) with constants.
template <int n, class F>
inline void for_constants(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (f(std::integral_constant<int, i>{}), ...); }
  (std::make_integer_sequence<int, n>{});
}

// The products of A tiles of tokens with groups [first, first + G).
template <int A, int G>
inline void multiply_tiles(const Product& p, int64_t first) {
  const int64_t stride = p.stride * int64_t(sizeof(float));
  const std::byte* const row = p.weights + first * p.group_bytes;
  for_constants<A>([&](auto a) { for_constants<G>([&](auto g) { zero_tile<sums_tile(a, g)>(); }); });
  for (int64_t u = 0; u < p.units; ++u) {
    const std::byte *w = row + u * tile_bytes, *acts = p.acts + u * p.tokens * tile_record;
    const Ahead<G> ahead = ahead_of<G>(p, w, row + p.group_bytes);
    for_constants<G>([&](auto g) {
      ahead.fetch(tile_bytes / G, g);
      load_tile_at<weights_tile<A>(g)>(w + g * p.group_bytes, tile_record);
      for_constants<A>([&](auto a) {
        if constexpr (g == 0) load_tile_at<acts_tile + a>(acts + a * tile_bytes, tile_record);
        dot_tiles_bf16<sums_tile(a, g), acts_tile + a, weights_tile<A>(g)>();
      });
    });
  }
  for_constants<A>([&](auto a) {
    for_constants<G>([&](auto g) { store_tile_at<sums_tile(a, g)>(p.out + a * tile_rows * p.stride + (first + g) * lanes, stride); });
  });
}

// Tokens that fit two tiles meet one row of weights after the other, as they lie, since those may come from memory.
template <int A, int G>
inline void multiply_few(const Product& p) {
  int64_t g = 0;
  for (; g + G <= p.groups; g += G) multiply_tiles<A, G>(p, g);
  if constexpr (G == 4)
    if (g + 2 <= p.groups) multiply_tiles<A, 2>(p, g), g += 2;
  if (g < p.groups) multiply_tiles<A, 1>(p, g);
}

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

// Of 32 columns: two tiles of tokens, one after the other, and a tile of each of two groups.
struct UnitTiles {
  const std::byte *acts, *weights, *others;
};
constexpr int64_t acts_step = 2 * tile_bytes;
constexpr int acts_0 = acts_tile, acts_1 = acts_0 + 1, weights_0 = weights_tile<2>(0), weights_1 = weights_tile<2>(1);

// A register is loaded again as soon as its last product has been issued and is needed a product or two later, since odd units go through
// the four products another way round. The first unit's tiles are expected in their registers, those of `after` are left there.
inline void multiply_units(UnitTiles now, const UnitTiles& after, int64_t units, LinesAhead weights, LinesAhead acts) {
  for (int64_t u = 0; u < units; ++u) {
    const UnitTiles next = u + 1 == units ? after : UnitTiles{now.acts + acts_step, now.weights + tile_bytes, now.others + tile_bytes};
    if (u % 2 == 0) {
      dot_tiles_bf16<0, acts_0, weights_0>();
      dot_tiles_bf16<2, acts_1, weights_0>();
      load_tile_at<weights_0>(next.weights, tile_record);
      dot_tiles_bf16<3, acts_1, weights_1>();
      load_tile_at<acts_1>(next.acts + tile_bytes, tile_record);
      dot_tiles_bf16<1, acts_0, weights_1>();
      load_tile_at<acts_0>(next.acts, tile_record);
    } else {
      dot_tiles_bf16<2, acts_1, weights_0>();
      dot_tiles_bf16<0, acts_0, weights_0>();
      load_tile_at<weights_0>(next.weights, tile_record);
      dot_tiles_bf16<1, acts_0, weights_1>();
      load_tile_at<acts_0>(next.acts, tile_record);
      dot_tiles_bf16<3, acts_1, weights_1>();
      load_tile_at<acts_1>(next.acts + tile_bytes, tile_record);
    }
    load_tile_at<weights_1>(next.others, tile_record);
    weights.fetch();
    acts.fetch();
    now = next;
  }
}

// `tiles` × 32 tokens meet a stretch of columns before any meets the next: its weights stay in the second-level cache and those of the next
// come there meanwhile, however many columns there are.
void multiply_many(const Product& p, int64_t tiles) {
  constexpr int64_t stretch = 16, tokens = 2 * tile_rows;
  const WholeTiles registers;
  const int64_t pairs = (p.groups + 1) / 2, stride = p.stride * int64_t(sizeof(float));
  // A unit of a pair brings so many lines: of weights a power of two, so that a pair's lie in one group.
  const int64_t weight_lines = 2 * tile_lines / int64_t(std::bit_floor(uint64_t(tiles))), act_lines = (2 * tile_lines + pairs - 1) / pairs;
  const auto at = [&](int64_t from, int64_t tile, int64_t pair) {
    const std::byte* const w = p.weights + 2 * pair * p.group_bytes + from * tile_bytes;
    return UnitTiles{p.acts + (tile * p.units + from) * acts_step, w, 2 * pair + 1 < p.groups ? w + p.group_bytes : w};
  };
  const UnitTiles first = at(0, 0, 0);
  load_tile_at<acts_0>(first.acts, tile_record);
  load_tile_at<acts_1>(first.acts + tile_bytes, tile_record);
  load_tile_at<weights_0>(first.weights, tile_record);
  load_tile_at<weights_1>(first.others, tile_record);
  for (int64_t from = 0; from < p.units; from += stretch) {
    const int64_t units = std::min(stretch, p.units - from);
    const bool last = from + units == p.units;
    const std::byte* const next_weights = last ? p.next : p.weights + (from + units) * tile_bytes;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const bool end = last && tile + 1 == tiles;
      const UnitTiles next_tile = tile + 1 < tiles ? at(from, tile + 1, 0) : last ? first : at(from + units, 0, 0);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        LinesAhead weights{}, acts{};
        const int64_t line = (tile * pairs + pair) * units * weight_lines, group = line / (units * tile_lines);
        if (next_weights && group < p.groups)
          weights = {next_weights + group * p.group_bytes + line % (units * tile_lines) * 64, weight_lines};
        if (!end) acts = {next_tile.acts + pair * units * act_lines * 64, act_lines};
        float* const out = p.out + tile * tokens * p.stride + 2 * pair * lanes;
        float* const below = out + tile_rows * p.stride;
        const bool two = 2 * pair + 1 < p.groups;
        if (from == 0) {
          for_constants<4>([](auto sums) { zero_tile<sums>(); });
        } else {
          load_tile_at<0>(out, stride);
          load_tile_at<2>(below, stride);
          if (two) load_tile_at<1>(out + lanes, stride), load_tile_at<3>(below + lanes, stride);
        }
        multiply_units(at(from, tile, pair), pair + 1 < pairs ? at(from, tile, pair + 1) : next_tile, units, weights, acts);
        store_tile_at<0>(out, stride);
        store_tile_at<2>(below, stride);
        if (two) store_tile_at<1>(out + lanes, stride), store_tile_at<3>(below + lanes, stride);
      }
    }
  }
}

void product_bf16_tiles(const Product& p) {
  constexpr int pair = 2 * tile_rows;
  const int whole = p.tokens >= 2 * pair ? p.tokens / pair : 0;
  if (whole) multiply_many(p, whole);
  for (int t = whole * pair; t < p.tokens; t += pair) {
    Product few = p;
    few.acts += t * p.units * tile_record;
    few.out += t * p.stride;
    few.tokens = std::min(pair, p.tokens - t);
    few.fetch = p.fetch && t == 0;
    if (few.tokens <= tile_rows) {
      const auto n = uint8_t(few.tokens);
      const Tiles tiles({n, n, n, n, n, tile_rows, tile_rows, tile_rows});
      multiply_few<1, 4>(few);
    } else {
      const auto n = uint8_t(few.tokens - tile_rows);
      const Tiles tiles({tile_rows, tile_rows, n, n, tile_rows, n, tile_rows, tile_rows});
      multiply_few<2, 2>(few);
    }
  }
}

constexpr void add_linear_amx(Kernels& k) {
  k.acts[int(DType::bf16)] = {ActKind::bf16, 0, false, int(tile_record), 2 * tile_rows, true};
  k.product[int(DType::bf16)] = product_bf16_tiles;
}

}  // namespace
}  // namespace mla
