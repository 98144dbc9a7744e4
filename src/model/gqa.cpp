// Grouped-query attention; with as many groups as heads it is MHA, with one it is MQA.
#include "model/step.h"

namespace mla {

void attend_gqa(Step& s, int layer, const GqaWeights& w, Tensor x) {
  const Config& c = s.config;
  ArenaScope scope(s.arena);
  const int64_t n = x.shape[0], n_h = c.num_attention_heads, n_g = c.num_key_value_heads, d_h = c.head_dim;
  Tensor h = s.arena.tensor(DType::f32, {n, c.hidden_size});
  Tensor q = s.arena.tensor(DType::f32, {n, n_h * d_h});
  Tensor rows = s.arena.tensor(DType::f32, {n, 2 * n_g * d_h});  // [keys | values], as the cache has them
  const Projection projections[] = {
      {w.q, w.q_bias, q}, {w.k, w.k_bias, slice(rows, 1, 0, n_g * d_h)}, {w.v, w.v_bias, slice(rows, 1, n_g * d_h, n_g * d_h)}};
  s.device.linear_normed(x, w.attn_norm, float(c.rms_norm_eps), h, projections);
  q = view(q.data, DType::f32, {n, n_h, d_h}, q.place);
  Tensor k = view(rows.data, DType::f32, {n, 2 * n_g, d_h}, rows.place);
  s.device.rope(q, s.cos_sin, c.rope_interleaved);
  s.device.rope(slice(k, 1, 0, n_g), s.cos_sin, c.rope_interleaved);
  s.note("attn.query", q);
  s.note("attn.rows", rows);

  const Kv kv = s.cache.layer(layer);
  s.device.store(rows, s.slots, kv);
  Tensor o = s.arena.tensor(DType::f32, {n, n_h, d_h});
  Tensor lse = s.arena.tensor(DType::f32, {n, n_h});
  s.device.attend(q, kv, s.spans, {.causal = true, .window = c.sliding_window}, float(c.softmax_scale()), o, lse);
  s.note("attn.output", o);
  s.device.linear(view(o.data, DType::f32, {n, n_h * d_h}, o.place), w.o, w.o_bias, x, true);
}

}  // namespace mla
