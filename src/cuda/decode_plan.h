// Absorbed decode's work shared out over the multiprocessors: made on the host once a step, read by every layer's kernels.
#pragma once

#include "device/attention.h"

#include <vector>

namespace mla::cuda {

constexpr int tile_tokens = 64;  // cache rows a kernel reads at a time
constexpr int block_rows = 64;   // (query, head) pairs a thread block serves
constexpr int slab_rows = 16;    // of them that are joined together

// A run of one sequence's tiles for one part of the multiprocessors.
struct DecodeItem {
  int32_t start, rows;  // first query in the batch; queries × heads
  int32_t table;        // where the sequence's pages begin in `pages`
  int32_t tile_begin, tile_end;
  int32_t kv_count;  // rows the sequence has
  int32_t limit;     // rows its first query sees; each later query sees one more
  int32_t slot;      // of its sequence's first piece, or -1 for a sequence in one piece
  int32_t piece, pieces;
};

// What one part of the multiprocessors does: items [begin, end), `tiles` in all, the first repeated here with the pages of its first tiles,
// so that a kernel starts after one read of memory.
struct DecodePart {
  static constexpr int first_tiles = 3;
  DecodeItem first;
  int32_t begin, end, tiles;
  int32_t page[first_tiles];
};
static_assert(sizeof(DecodePart) == 64);  // half a line of memory

// The pieces [slot, slot + pieces) of a sequence that was split.
struct DecodeMerge {
  int32_t start, rows;
  int32_t slot, pieces;
};

struct DecodePlan {
  int row_blocks = 1;              // blocks of 64 rows that the longest sequence of queries needs; all go through the same items
  int slots = 0, most_pieces = 0;  // partial results; most of one sequence
  int most_rows = 0;               // queries × heads of a sequence
  std::vector<DecodePart> parts;
  std::vector<DecodeItem> items;
  std::vector<DecodeMerge> merges;
  std::vector<int32_t> pages;
};

struct DecodeCosts {
  int item = 2;          // what an item costs beside its tiles, in tiles: queries in, results out, partial results to merge
  int fewest_tiles = 2;  // of a piece; 1 where no sequence has more than few_tiles, which make few pieces in any case
  int few_tiles = 32;
  int merge = 6;  // splitting at all
};

// Spans of a whole cache (kv_position 0 or a tile), causal or not, for n_h heads on `processors` multiprocessors.
DecodePlan plan_decode(Spans spans, bool causal, int n_h, int page_tokens, int processors, DecodeCosts costs = {});

// How a kernel joins the pieces of split sequences: a warp takes 16 rows and 16 columns of a sequence, or a team of neighbouring warps,
// each with its share of the pieces. Blocks of `warps` warps, a multiple of a team, for each merge, 16 rows and some columns.
struct MergeShape {
  static constexpr int most_warps = 8, most_bytes = 100 << 10;                        // of a block; two fit a multiprocessor
  static constexpr int o_bytes = slab_rows * 16 * 2, sums_bytes = 3 * slab_rows * 4;  // of one piece
  static constexpr int few = 4, many = 16;                                            // pieces that a warp joins at once
  int team, warps, blocks;                                                            // blocks in all
  int share;                                                                          // pieces of a warp at most
  int bytes() const { return warps * share * (o_bytes + sums_bytes); }
};

MergeShape merge_shape(int merges, int most_pieces, int most_rows, int d_v, int processors);

}  // namespace mla::cuda
