// Multi-head latent attention (DeepSeek-V2, section 2.1.2): absorbed, in the latent space, and expanded, with keys and values formed.
#include "core/check.h"
#include "model/step.h"

#include <algorithm>

namespace mla {
namespace {

// Context tokens whose keys and values are expanded at a time, whatever the context. The CPU's 24 MB were measured on V2-Lite's shape at
// 16k against 64 MB, which leave the last cache, and 12 MB, where merging the tiles costs more: +2 to +4% and +1 to +7%.
int64_t expansion_tile(const Config& c, int64_t tile_bytes) {
  const int64_t bytes = int64_t(c.num_attention_heads) * (6 * (c.qk_nope_head_dim + c.v_head_dim) + 2 * c.qk_rope_head_dim);
  return std::clamp<int64_t>(tile_bytes / bytes / 64 * 64, 64, 65536);
}

struct Projected {
  Tensor q;        // [n, n_h, d_h + d_R] (eq. 12-14), before it is rotated
  Tensor latents;  // [n, d_c + d_R]: [c_kv ; k_R] (eq. 9 and 15), before the latent is normed and the key rotated
};

Projected project(Step& s, const MlaWeights& w, Tensor x) {
  const Config& c = s.config;
  const int64_t n = x.shape[0], n_h = c.num_attention_heads, d_h = c.qk_nope_head_dim, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank;
  Tensor q = s.arena.tensor(DType::f32, {n, n_h * (d_h + d_R)});
  Tensor rows = s.arena.tensor(DType::f32, {n, d_c + d_R});
  Tensor h = s.arena.tensor(DType::f32, {n, c.hidden_size});
  auto linear = [&](std::initializer_list<Projection> projections) {
    s.device.linear_normed(x, w.attn_norm, float(c.rms_norm_eps), h, std::span(projections.begin(), projections.size()));
  };
  if (w.q) {
    linear({{w.q, {}, q}, {w.kv_a, w.kv_a_bias, rows}});
  } else {
    ArenaScope scope(s.arena);
    Tensor latent = s.arena.tensor(DType::f32, {n, c.q_lora_rank});
    linear({{w.q_a, w.q_a_bias, latent}, {w.kv_a, w.kv_a_bias, rows}});
    s.device.rms_norm(latent, w.q_a_norm, float(c.latent_norm_eps), latent);
    s.device.linear(latent, w.q_b, {}, q);
  }
  q = view(q.data, DType::f32, {n, n_h, d_h + d_R}, q.place);
  if (s.dump) {
    ArenaScope scope(s.arena);
    const Tensor rotated = s.arena.tensor(DType::f32, {n, n_h, d_h + d_R});
    s.device.copy(q, rotated);
    s.device.rope(slice(rotated, 2, d_h, d_R), s.cos_sin, c.rope_interleaved);
    s.note("attn.query", rotated);
  }
  return {q, rows};
}

// Absorbed: q_c·k_c = q_c·(W_UK c) = (W_UKᵀ q_c)·c, and Σ p v = W_UV Σ p c. One cache head of width d_c + d_R serves all heads, so
// this is MQA over latents; no key or value is formed. q [n, n_h, d_h + d_R] → o [n, n_h, d_v]. With data, q_latent [n, n_h, d_c + d_R], in
// the device's type for queries, has them in the latent space already.
void attend_absorbed(Step& s, const MlaWeights& w, const Kv& kv, Spans spans, Tensor q, Tensor q_latent, Tensor cos_sin, Tensor o) {
  const Config& c = s.config;
  ArenaScope scope(s.arena);
  const int64_t n = q.shape[0], n_h = c.num_attention_heads, d_h = c.qk_nope_head_dim, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank;
  if (!q_latent.data) {
    q_latent = s.arena.tensor(s.device.query_type(kv), {n, n_h, d_c + d_R});
    s.device.rope(slice(q, 2, d_h, d_R), cos_sin, c.rope_interleaved, slice(q_latent, 2, d_c, d_R));
    s.device.linear_heads(slice(q, 2, 0, d_h), w.k_b_absorbed, slice(q_latent, 2, 0, d_c));
  }
  Tensor o_latent = s.arena.tensor(DType::f32, {n, n_h, d_c});
  Tensor lse = s.arena.tensor(DType::f32, {n, n_h});
  s.device.attend(q_latent, kv, spans, {}, float(c.softmax_scale()), o_latent, lse);
  s.device.linear_heads(o_latent, w.v_b, o);
}

// Expanded: k = [W_UK c ; k_R] and v = W_UV c (eq. 10, 11, 17) are formed tile by tile of the context and the tiles' attention merged.
void attend_expanded(Step& s, const MlaWeights& w, const Kv& kv, const Span& span, Tensor q, Tensor cos_sin, Tensor o) {
  const Config& c = s.config;
  ArenaScope scope(s.arena);
  const int64_t n_h = c.num_attention_heads, d_h = c.qk_nope_head_dim, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank, d_v = c.v_head_dim;
  s.device.rope(slice(q, 2, d_h, d_R), cos_sin, c.rope_interleaved);
  const int64_t tile = std::min<int64_t>(expansion_tile(c, s.device.tile_bytes), span.kv_count);
  // Expanded rows are as precise as the cache they come from.
  const DType type = kv.format.type == DType::f32 ? DType::f32 : DType::bf16;
  const KvFormat format{{int(n_h), int(d_h + d_R), int(d_v), false}, type};
  Tensor rows = s.arena.tensor(DType::f32, {tile, d_c + d_R});
  Tensor expanded = s.arena.tensor(DType::f32, {tile, n_h * (d_h + d_v)});
  auto* memory = static_cast<std::byte*>(s.arena.bytes(size_t(tile * format.row_bytes())));
  Tensor lse = s.arena.tensor(DType::f32, {q.shape[0], n_h});
  const Kv contiguous{format, memory, tile * format.row_bytes(), int(tile)};
  const int32_t first_page = 0;
  for (int64_t from = 0; from < span.kv_count; from += tile) {
    const int64_t m = std::min(tile, span.kv_count - from);
    const Tensor part = slice(rows, 0, 0, m), kv_part = slice(expanded, 0, 0, m);
    s.device.load(kv, span, from, part);
    s.device.linear(slice(part, 1, 0, d_c), w.kv_b, {}, kv_part);
    s.device.store_expanded(view(kv_part.data, DType::f32, {m, n_h, d_h + d_v}, kv_part.place), slice(part, 1, d_c, d_R), contiguous);
    Span piece = span;
    piece.kv_position = span.kv_position + int32_t(from);
    piece.kv_count = int32_t(m);
    piece.pages = &first_page;
    s.device.attend(q, contiguous, Spans(&piece, 1), {}, float(c.softmax_scale()), o, lse, from ? Attend::merge : Attend::replace);
  }
}

}  // namespace

bool absorbs(const Step& s, const Span& span) {
  if (s.form != MlaForm::automatic) return s.form == MlaForm::absorbed;
  return absorbed_is_cheaper(s.config, span.count, span.kv_count);
}

bool absorbed_is_cheaper(const Config& c, int64_t n, int64_t T) {
  if (n == 1) return true;
  const double d_h = c.qk_nope_head_dim, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank, d_v = c.v_head_dim;
  const double matrices = 2 * d_c * (d_h + d_v);  // of a head; absorbed, each new token meets them; expanded, each token of the context
  const double absorbed = double(n) * double(T) * 2 * (2 * d_c + d_R) + double(n) * matrices;
  const double expanded = double(n) * double(T) * 2 * (d_h + d_R + d_v) + double(T) * matrices;
  return absorbed <= expanded;
}

void attend_mla_heads(Step& s, int layer, const MlaWeights& w, Tensor x, Tensor o) {
  const Config& c = s.config;
  ArenaScope scope(s.arena);
  const int64_t n = x.shape[0], n_h = c.num_attention_heads, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank;
  const auto [q, rows] = project(s, w, x);
  const Kv kv = s.cache.layer(layer);
  // Where all absorb, as in decode, queries go into the latent space along with the keys.
  const bool all = std::all_of(s.spans.begin(), s.spans.end(), [&](const Span& span) { return absorbs(s, span); });
  const Tensor q_latent = all ? s.arena.tensor(s.device.query_type(kv), {n, n_h, d_c + d_R}) : Tensor{};
  const Absorbed absorbed{q, w.k_b_absorbed, q_latent};
  s.device.store_latents(rows, w.kv_a_norm, float(c.latent_norm_eps), s.cos_sin, c.rope_interleaved, s.slots, kv,
                         all ? &absorbed : nullptr);
  s.note("attn.latent", rows);

  // Each sequence takes its cheaper form; neighbours that absorb go together.
  for (size_t i = 0; i < s.spans.size();) {
    size_t end = i;
    while (end < s.spans.size() && absorbs(s, s.spans[end])) ++end;
    const size_t last = std::max(end, i + 1);
    const int64_t row = s.spans[i].start, count = s.spans[last - 1].start + s.spans[last - 1].count - row;
    std::vector<Span> run(s.spans.begin() + int64_t(i), s.spans.begin() + int64_t(last));
    for (Span& span : run) span.start -= int32_t(row);
    const Tensor q_run = slice(q, 0, row, count), angles = slice(s.cos_sin, 0, row, count), o_run = slice(o, 0, row, count);
    if (end > i)
      attend_absorbed(s, w, kv, run, q_run, q_latent, angles, o_run);
    else
      attend_expanded(s, w, kv, run[0], q_run, angles, o_run);
    i = last;
  }
  s.note("attn.output", o);
}

void attend_mla(Step& s, int layer, const MlaWeights& w, Tensor x) {
  ArenaScope scope(s.arena);
  const int64_t n = x.shape[0], n_h = s.config.num_attention_heads, d_v = s.config.v_head_dim;
  Tensor o = s.arena.tensor(DType::f32, {n, n_h, d_v});
  attend_mla_heads(s, layer, w, x, o);
  s.device.linear(view(o.data, DType::f32, {n, n_h * d_v}, o.place), w.o, w.o_bias, x, true);
}

}  // namespace mla
