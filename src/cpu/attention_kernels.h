// Attention: which form's products a unit runs in, and how pieces of the context are merged.
#pragma once

#include "cpu/attention_i16_kernels.h"
#if defined(__AMX_BF16__)
#include "cpu/attention_amx_kernels.h"
#endif

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

inline void attend_lanes(const AttentionUnit& u) {
  const bool narrow = u.kv->format.type != DType::f32;
  const int widest = std::max(u.kv->format.layout.d_k, u.kv->format.layout.d_v);
#if defined(__AMX_BF16__)
  if (fits_tiles(u.kv->format)) return attend_lanes_amx(u);
#endif
  if (isa_has_bf16 && narrow)
    attend_lanes_in<InBf16>(u);
  else if (isa_has_i16 && narrow && widest <= most_chunks * code_chunk)
    attend_lanes_i16(u);
  else
    attend_lanes_in<InF32>(u);
}

// What merging needs of one query row's pieces: their weights over the merged total, that of what o holds, and the new log-sum-exp.
struct Merge {
  float old = 0, lse;
  template <class Top, class Total, class Weight>
  Merge(int pieces, const float* lse_before, Top top, Total total, Weight weight) {
    const float none = -__builtin_inff();
    float most = lse_before ? *lse_before : none;
    for (int i = 0; i < pieces; ++i) most = top(i) > most ? top(i) : most;
    lse = none;
    for (int i = 0; i < pieces; ++i) weight(i) = 0;
    if (most == none) return;
    double sum = lse_before ? std::exp(double(*lse_before) - most) : 0;
    const double before = sum;
    for (int i = 0; i < pieces; ++i) sum += (weight(i) = float(std::exp(double(top(i)) - most))) * double(total(i));
    for (int i = 0; i < pieces; ++i) weight(i) = float(weight(i) / sum);
    old = float(before / sum);
    lse = float(most + std::log(sum));
  }
};

inline void finish_lanes(const AttentionFinish& f) {
  float weight[attention_pieces][16] = {}, old[16] = {};
  for (int r = 0; r < f.rows; ++r) {
    const Merge merge(
        f.pieces, f.merge ? f.lse[r] : nullptr, [&](int i) { return f.state[i * f.piece + r]; },
        [&](int i) { return f.state[i * f.piece + 16 + r]; }, [&](int i) -> float& { return weight[i][r]; });
    old[r] = merge.old;
    if (f.lse_out) f.lse_out[r] = merge.lse;
  }
  for (int d = f.from; d < f.to; d += 16) {
    f32x16 block[16];
    for (int i = 0; i < 16; ++i) block[i] = zero_f32();
    for (int p = 0; p < f.pieces; ++p) {
      const float* o = f.state + p * f.piece + 32 + d * 16;
      const f32x16 w = load(weight[p]);
      for (int i = 0; i < 16; ++i) block[i] = fma(w, load(o + i * 16), block[i]);
    }
    transpose(block);
    const int n = f.to - d < 16 ? f.to - d : 16;
    for (int r = 0; r < f.rows; ++r) {
      const f32x16 x = f.merge ? fma(splat(old[r]), load(f.o[r] + d, n), block[r]) : block[r];
      store(f.o[r] + d, x, n);
    }
  }
}

inline void finish_rows(const AttentionFinish& f) {
  float weight[attention_pieces];
  const Merge merge(
      f.pieces, f.merge ? f.lse[0] : nullptr, [&](int i) { return f.state[i * f.piece]; }, [&](int i) { return f.state[i * f.piece + 1]; },
      [&](int i) -> float& { return weight[i]; });
  if (f.lse_out) *f.lse_out = merge.lse;
  for (int d = f.from; d < f.to; d += 16) {
    const int n = f.to - d < 16 ? f.to - d : 16;
    f32x16 x = f.merge ? splat(merge.old) * load(f.o[0] + d, n) : zero_f32();
    for (int p = 0; p < f.pieces; ++p) x = fma(splat(weight[p]), load(f.state + p * f.piece + 16 + d), x);
    store(f.o[0] + d, x, n);
  }
}

// With 32 registers the form "rows" is faster up to a whole vector of query rows, as decode of MLA with 16 heads has; not than whole
// numbers.
constexpr AttentionKernels attention_kernels() {
  constexpr int f32 = vector_registers < 32 ? 4 : most_query_rows, narrow = isa_has_i16 ? 4 : f32;
  return {f32, narrow, attend_lanes, attend_rows, finish_lanes, finish_rows, write_row, read_row};
}

}  // namespace
}  // namespace mla
