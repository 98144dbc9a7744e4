// The instructions of the tile unit of Intel's servers (AMX). Tests put the same in plain C++ in their place.
#pragma once

#include <cstdint>

namespace mla {
namespace {

// The palette; from 16 on row bytes of each tile, of 16 bits, from 48 on its rows. All tiles are zeros then.
inline void configure_tiles(const uint8_t (&config)[64]) { asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease"); }

// Rows of a tile are `step` bytes apart.
template <int tile>
inline void load_tile_at(const void* p, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(step), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile_at(void* p, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(step), "i"(tile) : "memory");
}
template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// sums [m][n] += Σ_k Σ_{c<2} a[m][2k + c] · b[k][2n + c], of bf16 in f32
template <int sums, int a, int b>
inline void dot_tiles_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

}  // namespace
}  // namespace mla
