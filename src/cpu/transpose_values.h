// The values of a tile of the context as AMX's tiles want them, by AVX-512.
#pragma once

#include "cpu/attention_lanes_kernels.h"

namespace mla {
namespace {

// values [d_v][attention_tile] = the values of a tile, zeros beyond the last up to `padded` rows, a multiple of 32.
inline void transpose_values(const LaneTile<InBf16>& tile, int padded, int64_t d_v, uint16_t* values) {
  const __m512i none = _mm512_setzero_si512();
  for (int from = 0; from < padded; from += 32)
    for (int64_t d = 0; d < d_v; d += 32)
      for (int odd = 0; odd < 2; ++odd) {
        f32x16 pairs[16];  // lane j: element d + 2j + odd of two rows
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int t = from + 2 * i;
          const __m512i x = t < tile.n ? _mm512_loadu_si512(tile.value[t] + d) : none;
          const __m512i y = t + 1 < tile.n ? _mm512_loadu_si512(tile.value[t + 1] + d) : none;
          pairs[i].v = _mm512_castsi512_ps(odd ? _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y)
                                               : _mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16)));
        }
        transpose(pairs);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) _mm512_store_ps(values + (d + 2 * j + odd) * attention_tile + from, pairs[j].v);
      }
}

}  // namespace
}  // namespace mla
