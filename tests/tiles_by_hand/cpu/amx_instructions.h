// Stands in for src/cpu/amx_instructions.h: the tile unit in plain C++, so that the kernels for it are tested on every machine. All rows
// have 64 bytes here. What the unit refuses ends the program.
#pragma once

#include "core/dtype.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace mla {
namespace {

struct TileRegister {
  int rows;
  uint32_t word[16][16];
};
thread_local TileRegister tile_registers[8];

inline void release_tiles() { std::memset(tile_registers, 0, sizeof tile_registers); }
inline void configure_tiles(const uint8_t (&config)[64]) {
  release_tiles();
  for (int i = 0; i < 8; ++i) tile_registers[i].rows = config[48 + i];
}

template <int tile>
inline void load_tile_at(const void* p, int64_t step) {
  TileRegister& t = tile_registers[tile];
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.word[r], static_cast<const char*>(p) + r * step, 64);
}
template <int tile>
inline void store_tile_at(void* p, int64_t step) {
  const TileRegister& t = tile_registers[tile];
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(p) + r * step, t.word[r], 64);
}
template <int tile>
inline void zero_tile() {
  std::memset(tile_registers[tile].word, 0, sizeof tile_registers[tile].word);
}
template <int sums, int a, int b>
inline void dot_tiles_bf16() {
  static_assert(sums != a && sums != b && a != b);
  TileRegister &c = tile_registers[sums], &x = tile_registers[a], &y = tile_registers[b];
  if (c.rows == 0 || c.rows != x.rows || y.rows != 16) std::abort();
  const auto low = [](uint32_t pair) { return bf16_to_f32(uint16_t(pair)); };
  const auto high = [](uint32_t pair) { return bf16_to_f32(uint16_t(pair >> 16)); };
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, &c.word[m][n], 4);
      for (int k = 0; k < y.rows; ++k) sum += low(x.word[m][k]) * low(y.word[k][n]) + high(x.word[m][k]) * high(y.word[k][n]);
      std::memcpy(&c.word[m][n], &sum, 4);
    }
}

}  // namespace
}  // namespace mla
