// What the four attentions leave in the cache, and how a batch of sequences reads it. Everything attention-like is said here once.
#pragma once

#include "core/dtype.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace mla {

// The shape of a cache row. MHA, GQA, MQA and MLA differ in nothing else: K and V are two strided views of one row, and in MLA
// V is the first d_v columns of K, so that one latent serves both (DeepSeek-V2, section 2.1.2).
struct KvLayout {
  int heads;    // heads that K and V have in the cache
  int d_k;      // elements of a key as the query meets it
  int d_v;      // elements of a value as the output has it
  bool v_in_k;  // V = K[..., :d_v]

  // Elements a token leaves in one layer: the paper's Table 1.
  constexpr int64_t row() const { return int64_t(heads) * (v_in_k ? d_k : d_k + d_v); }

  static constexpr KvLayout mha(int n_h, int d_h) { return {n_h, d_h, d_h, false}; }
  static constexpr KvLayout gqa(int n_g, int d_h) { return {n_g, d_h, d_h, false}; }
  static constexpr KvLayout mqa(int d_h) { return {1, d_h, d_h, false}; }
  static constexpr KvLayout mla(int d_c, int d_R) { return {1, d_c + d_R, d_c, true}; }
};

// Table 1 of the paper, in elements per token and layer: 2 n_h d_h, 2 n_g d_h, 2 d_h, d_c + d_R = 4.5 d_h (V2: d_h 128).
static_assert(KvLayout::mha(128, 128).row() == 2 * 128 * 128);
static_assert(KvLayout::gqa(8, 128).row() == 2 * 8 * 128);
static_assert(KvLayout::mqa(128).row() == 2 * 128);
static_assert(KvLayout::mla(512, 64).row() == 512 + 64 && 2 * KvLayout::mla(512, 64).row() == 9 * 128);

// How the elements of a row are stored: f32, f16, bf16, or as codes, i8 or f8 (e4m3). With codes, a row is
//   [codes of the quantised elements][bf16 of the kept elements][f32 scales], padded to a multiple of 4 bytes,
// where MLA quantises the latent and keeps the rotary part, and the others quantise all of K and V. A scale serves a group of
// consecutive elements of one head's key or value (the last group of a head may be shorter): x ≈ code × scale.
//   i8: groups of 64, scale = max|x| / 127.
//   f8: groups of 128; the scale is the least power of two, at most 2^7, that takes max|x| to 448 or less. bf16 holds every x exactly.
struct KvFormat {
  KvLayout layout;
  DType type;  // f32, f16, bf16, i8 or f8

  static constexpr int i8_group = 64, f8_group = 128;

  constexpr bool coded() const { return type == DType::i8 || type == DType::f8; }
  constexpr int group() const { return type == DType::f8 ? f8_group : i8_group; }
  constexpr int64_t groups(int64_t n) const { return (n + group() - 1) / group(); }
  constexpr int64_t quantised() const { return !coded() ? 0 : layout.v_in_k ? int64_t(layout.heads) * layout.d_v : layout.row(); }
  constexpr int64_t kept() const { return layout.row() - quantised(); }
  // Scales of one row. Keys come first, head by head, then values; in MLA there is the latent alone.
  constexpr int64_t scales() const {
    if (!coded()) return 0;
    return layout.v_in_k ? layout.heads * groups(layout.d_v) : layout.heads * (groups(layout.d_k) + groups(layout.d_v));
  }
  constexpr int64_t kept_offset() const { return (quantised() + 3) / 4 * 4; }                  // bytes; of codes only
  constexpr int64_t scale_offset() const { return (kept_offset() + 2 * kept() + 3) / 4 * 4; }  // bytes; of codes only
  constexpr int64_t row_bytes() const { return coded() ? scale_offset() + 4 * scales() : mla::row_bytes(type, layout.row()); }
};
static_assert(KvFormat{KvLayout::mla(512, 64), DType::i8}.row_bytes() == 512 + 2 * 64 + 4 * 8);
static_assert(KvFormat{KvLayout::mla(512, 64), DType::f8}.row_bytes() == 512 + 2 * 64 + 4 * 4);
static_assert(KvFormat{KvLayout::mla(512, 64), DType::bf16}.row_bytes() * 27 == 31104);  // V2-Lite, bytes per token

// One layer's cache: pages of `page_tokens` rows. A contiguous sequence is one page of its length.
struct Kv {
  KvFormat format;
  std::byte* base;  // page p starts at base + p * page_bytes; row t of it follows at t * row_bytes()
  int64_t page_bytes;
  int page_tokens;

  std::byte* row(int32_t page, int64_t t) const { return base + page * page_bytes + t * format.row_bytes(); }
};

// The queries of one sequence in a step and the rows they read.
struct Span {
  int32_t start;         // first query row in the batch
  int32_t count;         // queries, at consecutive positions
  int32_t position;      // position of the first query
  int32_t kv_position;   // position of the first row in `pages`; 0 for a whole cache, more for a tile of the context
  int32_t kv_count;      // rows in `pages`
  const int32_t* pages;  // page numbers; row j is page pages[j / page_tokens], slot j % page_tokens
};

// A query at position p sees the rows at positions in (p - window, p]; window 0 means all rows up to p.
struct Mask {
  bool causal = true;
  int window = 0;
};

using Spans = std::span<const Span>;

}  // namespace mla
