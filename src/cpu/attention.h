// Attention on the CPU: what a leaf's kernels do for one unit of work, and the sizes that the planner and the kernels share.
// docs/cpu-attention.md explains the two forms and their blocking.
#pragma once

#include "device/attention.h"

#include <cstddef>
#include <cstdint>

namespace mla {

// Context is met in tiles of this many rows; scores, weights and staged rows of a tile stay in the first-level caches.
constexpr int attention_tile = 64;
// Query rows of one unit: in the form "lanes" as vectors of 16, in the form "rows" those of all its cache heads.
constexpr int attention_vectors = 8;
// Spans with at most this many query rows per cache head may take the form "rows"; AttentionKernels says which do.
constexpr int most_query_rows = 16;
// A long context is split into at most this many pieces.
constexpr int attention_pieces = 32;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Queries of one span that read the same cache heads, and a stretch of the context. Query row r is token r / group and query head
// head · group + r % group. The result is a state: what an online softmax has gathered, ready to be merged and divided.
struct AttentionUnit {
  const Kv* kv;
  const Span* span;
  Mask mask;
  float scale;
  const float* q;  // the span's first token, head 0
  int64_t q_token, q_head;
  int group;        // query heads of one cache head
  int head, heads;  // cache heads; one in the form "lanes"
  int first, rows;  // query rows
  int from, to;     // rows of the context
  float* state;
  std::byte* scratch;
};

// A state of 16 query rows ("lanes") is [top 16][total 16][o: d_v padded × 16]; of one ("rows") it is [top, total, …16][o: d_v padded].
constexpr int64_t attention_width(const KvLayout& layout) { return round_up(layout.d_v, 32); }
constexpr int64_t lanes_state(const KvLayout& layout) { return 32 + attention_width(layout) * 16; }
constexpr int64_t rows_state(const KvLayout& layout) { return 16 + attention_width(layout); }

// Merges the states of a unit's pieces of context, in order, with what o holds if `merge`, and divides: elements [from, to) of o.
struct AttentionFinish {
  const float* state;  // of the first piece
  int64_t piece;       // floats from one piece's state to the next
  int pieces;
  int rows;  // up to 16 in the form "lanes", 1 in the form "rows"
  int from, to;
  bool merge;
  float* const* o;          // [rows], each [d_v]
  const float* const* lse;  // [rows], read if merge
  float* lse_out;           // [rows]; may be null
};

struct AttentionKernels {
  // Spans with up to this many query rows per cache head take the form "rows": of caches in f32, and of narrower ones.
  int few_rows_f32, few_rows_narrow;
  void (*lanes)(const AttentionUnit&);
  void (*rows)(const AttentionUnit&);
  void (*finish_lanes)(const AttentionFinish&);
  void (*finish_rows)(const AttentionFinish&);
  // One row of the cache from and to f32.
  void (*write_row)(const KvFormat&, const float* from, std::byte* to);
  void (*read_row)(const KvFormat&, const std::byte* from, float* to);
};

// Bytes of scratch a unit needs, whatever its form and the instruction set: queries, two copies of a tile's rows, and scores and weights.
constexpr int64_t attention_scratch(const KvLayout& layout) {
  const int64_t d_k = round_up(layout.d_k, 32), d_v = round_up(layout.d_v, 32), wide = d_k > d_v ? d_k : d_v;
  const int64_t queries = attention_vectors * 16 * d_k, tile = 2 * attention_tile * wide;
  return 4 * (queries + tile + 2 * attention_vectors * attention_tile * 16);
}

}  // namespace mla
