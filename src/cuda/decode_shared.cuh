// The shape of absorbed decode's blocks, and what lies where in their shared memory.
#pragma once

#include "cuda/decode.h"
#include "cuda/decode_softmax.cuh"
#include "cuda/launch.cuh"

namespace mla::cuda {

constexpr int decode_threads = 384;  // two warpgroups that compute, one whose first two warps load
constexpr int box_bytes = 64 * 128;  // 64 rows × 64 columns of bf16

// Codes: the cache has f8 codes, and the third warpgroup makes bf16 of them.
template <int Tiles, int Values, bool Codes = false>
struct DecodeShape {
  static constexpr bool codes = Codes;
  static constexpr int loader_registers = Codes ? 88 : 56, group_registers = Codes ? 208 : 224;  // a thread
  static constexpr int boxes = Tiles;
  static constexpr int values = Values;
  static constexpr int value_boxes = Values / 64;
  static constexpr int half_boxes = value_boxes > 1 ? value_boxes / 2 : 1;  // of values that the first warpgroup reads
  static constexpr int columns = Values / 2;                                // of the output, a warpgroup
  static constexpr int registers = columns / 2;                             // of it, a thread
  static constexpr bool shared_box = value_boxes == 1;                      // both warpgroups read the one box of values
  static constexpr int tile_bytes = Tiles * box_bytes;
  static constexpr int shared_bytes = 3 * tile_bytes + 2048;
};

// Rows of queries that a block loads at a time, where a sequence has at most so many.
__host__ __device__ constexpr int query_rows(int most_rows) {
  return slabs_of(most_rows < block_rows ? most_rows : block_rows) * slab_rows;
}

struct DecodeArguments {
  DecodeCall call;
  DecodePartials partial;
};

// What a block keeps in shared memory beside the queries and two tiles.
template <class S>
struct DecodeShared {
  uint64_t full[2][S::boxes];  // a box of a tile has come
  uint64_t empty[2][2];        // what a warpgroup read last of a tile may be overwritten
  uint64_t handed_over[2];     // a tile's probabilities, to the other warpgroup
  uint64_t cleared[2];         // rows past a tile's last
  uint64_t q_full[S::boxes];   // columns of the queries have come
  uint64_t q_empty, summed;
  float m[2][block_rows];     // the maxima after each warpgroup's softmax
  float l[2][2][block_rows];  // the warpgroups' shares of the sums; sequences take turns, so that nobody overwrites what is still read
};

extern __shared__ __align__(1024) uint8_t decode_memory[];

// Where things are in it. Its address is a constant, so that nothing of this takes registers.
template <class S>
struct DecodeBlock {
  __device__ static uint8_t* q() { return decode_memory; }  // [boxes][64 rows][64 columns]
  // The same; the last box, read for scores alone, then holds the probabilities for the other warpgroup.
  __device__ static uint8_t* k(int tile) { return decode_memory + (1 + tile) * S::tile_bytes; }
  __device__ static uint8_t* probabilities(int tile) { return k(tile) + (S::boxes - 1) * box_bytes; }
  __device__ static DecodeShared<S>& shared() { return *reinterpret_cast<DecodeShared<S>*>(decode_memory + 3 * S::tile_bytes); }
};

}  // namespace mla::cuda
