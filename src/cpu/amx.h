// The tile unit of Intel's servers (AMX): eight registers of 16 rows of 64 bytes, and products of them. Tiles come from memory and go back
// to it; what vectors just stored has to reach the cache before a tile takes it, so that both work a stage apart.
#pragma once

#include "cpu/amx_instructions.h"

#include <cstdint>

namespace mla {
namespace {

// While it lives, the thread has eight tiles, each of so many rows of 64 bytes. A product takes a cycle for each row of its first factor.
struct Tiles {
  explicit Tiles(const uint8_t (&rows)[8]) {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) config[48 + i] = rows[i], config[16 + 2 * i] = 64;
    configure_tiles(config);
  }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
struct WholeTiles : Tiles {
  WholeTiles() : Tiles({16, 16, 16, 16, 16, 16, 16, 16}) {}
};

}  // namespace
}  // namespace mla
