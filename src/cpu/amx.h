// The tile unit of Intel's servers (AMX): eight registers of 16 rows of 64 bytes, and products of them. Tiles come from memory and go back
// to it; what vectors just stored has to reach the cache before a tile takes it, so that both work a stage apart.
#pragma once

#include <cstdint>

namespace mla {
namespace {

// While it lives, the thread has eight tiles, each of so many rows of 64 bytes. A product takes a cycle for each row of its first factor.
struct Tiles {
  explicit Tiles(const uint8_t (&rows)[8]) {
    alignas(64) uint8_t config[64] = {1};  // the palette; from 16 on row bytes, of 16 bits each, from 48 on rows
    for (int i = 0; i < 8; ++i) config[48 + i] = rows[i], config[16 + 2 * i] = 64;
    asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
struct WholeTiles : Tiles {
  WholeTiles() : Tiles({16, 16, 16, 16, 16, 16, 16, 16}) {}
};

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
