// Products with bf16 weights on the tiles of AMX. Both factors lie in memory as tiles: 32 columns of a group of weights, and a block of up
// to 16 tokens. A row of a tile's product depends on no other row, and every number of tokens goes this way, so that results do not depend
// on the batch here either.
#pragma once

#include "cpu/amx.h"
#include "cpu/linear_kernels.h"

#include <algorithm>

namespace mla {
namespace {

constexpr int tile_rows = 16;

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

// Adds the columns of units [from, to) to the sums of A tiles of tokens over groups [first, first + G).
template <int A, int G>
inline void multiply_tiles(const Product& p, int64_t first, int64_t from, int64_t to) {
  constexpr int64_t unit = 1024, record = 64;
  const int64_t stride = p.stride * int64_t(sizeof(float));
  const std::byte* const row = p.weights + first * p.group_bytes;
  const auto sums_at = [&](int a, int g) { return p.out + a * tile_rows * p.stride + (first + g) * lanes; };
  for_constants<A>([&](auto a) {
    for_constants<G>([&](auto g) {
      if (from == 0)
        zero_tile<sums_tile(a, g)>();
      else
        load_tile_at<sums_tile(a, g)>(sums_at(a, g), stride);
    });
  });
  for (int64_t u = from; u < to; ++u) {
    const std::byte *w = row + u * unit, *acts = p.acts + u * p.tokens * record;
    const Ahead<G> ahead = ahead_of<G>(p, w, row + p.group_bytes);
    for_constants<G>([&](auto g) {
      ahead.fetch(unit / G, g);
      load_tile_at<weights_tile<A>(g)>(w + g * p.group_bytes, 64);
      for_constants<A>([&](auto a) {
        if constexpr (g == 0) load_tile_at<4 + a>(acts + a * tile_rows * record, record);
        dot_tiles_bf16<sums_tile(a, g), 4 + a, weights_tile<A>(g)>();
      });
    });
  }
  for_constants<A>([&](auto a) { for_constants<G>([&](auto g) { store_tile_at<sums_tile(a, g)>(sums_at(a, g), stride); }); });
}

// Activations of a stretch of columns stay close while all groups meet them; 32 units were fastest. Weights that come from memory are read
// row by row, as they lie.
template <int A, int G>
inline void multiply_stretches(const Product& p) {
  constexpr int64_t stretch = 32;
  const int64_t step = p.fetch || p.groups <= G ? p.units : stretch;
  for (int64_t from = 0; from < p.units; from += step) {
    const int64_t to = std::min(p.units, from + step);
    int64_t g = 0;
    for (; g + G <= p.groups; g += G) multiply_tiles<A, G>(p, g, from, to);
    if constexpr (G == 4)
      if (g + 2 <= p.groups) multiply_tiles<A, 2>(p, g, from, to), g += 2;
    if (g < p.groups) multiply_tiles<A, 1>(p, g, from, to);
  }
}

void product_bf16_tiles(const Product& p) {
  constexpr uint8_t whole = tile_rows;
  if (p.tokens <= tile_rows) {
    const auto n = uint8_t(p.tokens);
    const Tiles tiles({n, n, n, n, n, whole, whole, whole});
    multiply_stretches<1, 4>(p);
  } else {
    const auto rest = uint8_t(p.tokens - tile_rows);
    const Tiles tiles({whole, whole, rest, rest, whole, rest, whole, whole});
    multiply_stretches<2, 2>(p);
  }
}

constexpr void add_linear_amx(Kernels& k) {
  k.acts[int(DType::bf16)] = {ActKind::bf16, 0, false, 64, 2 * tile_rows, true};
  k.product[int(DType::bf16)] = product_bf16_tiles;
}

}  // namespace
}  // namespace mla
