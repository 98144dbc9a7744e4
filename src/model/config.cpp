// What follows from a configuration: checks, the softmax scale, and how many parameters the model has.
#include "model/config.h"

#include "core/check.h"
#include "io/checkpoint.h"
#include "model/config_parse.h"

#include <cmath>

namespace mla {
namespace {

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail_input("config: {} is {}; it must be between {} and {}", name, value, low, high);
}

void check_mla(const Config& c) {
  check_range("kv_lora_rank", c.kv_lora_rank, 1, 1 << 16);
  check_range("q_lora_rank", c.q_lora_rank, 0, 1 << 16);
  check_range("qk_nope_head_dim", c.qk_nope_head_dim, 1, 1 << 14);
  check_range("qk_rope_head_dim", c.qk_rope_head_dim, 2, 1 << 14);
  check_range("v_head_dim", c.v_head_dim, 1, 1 << 14);
  check_range("n_routed_experts", c.n_routed_experts, 0, 1 << 14);
  if (c.n_routed_experts == 0) return;
  check_range("n_shared_experts", c.n_shared_experts, 0, 1 << 10);
  check_range("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts);
  check_range("moe_intermediate_size", c.moe_intermediate_size, 1, 1 << 24);
  check_range("first_k_dense_replace", c.first_k_dense_replace, 0, c.num_hidden_layers);
  check_range("moe_layer_freq", c.moe_layer_freq, 1, 1 << 14);
  const double experts = 3.0 * double(c.hidden_size) * double(c.moe_intermediate_size) * (c.n_routed_experts + c.n_shared_experts);
  if (experts * c.num_hidden_layers > 1e15)  // so that no count of parameters overflows
    fail_input("config: {} layers of {} experts with {:.3g} parameters in all are too many", c.num_hidden_layers, c.n_routed_experts,
               experts);
  if (c.topk_method == Gating::greedy) return;
  check_range("n_group", c.n_group, 1, c.n_routed_experts);
  check_range("topk_group", c.topk_group, 1, c.n_group);
  if (c.n_routed_experts % c.n_group != 0)
    fail_input("config: n_routed_experts {} is not a multiple of n_group {}", c.n_routed_experts, c.n_group);
  if (c.num_experts_per_tok > c.topk_group * (c.n_routed_experts / c.n_group))
    fail_input("config: {} experts a token do not fit in {} groups of {}", c.num_experts_per_tok, c.topk_group,
               c.n_routed_experts / c.n_group);
}

}  // namespace

void check_config(const Config& c) {
  check_range("vocab_size", c.vocab_size, 1, 1 << 24);
  check_range("hidden_size", c.hidden_size, 1, 1 << 20);
  check_range("intermediate_size", c.intermediate_size, 1, 1 << 24);
  check_range("num_hidden_layers", c.num_hidden_layers, 1, 1 << 12);
  check_range("num_attention_heads", c.num_attention_heads, 1, 1 << 12);
  check_range("sliding_window", c.sliding_window, 0, 1 << 30);
  if (!(c.rms_norm_eps > 0 && c.rms_norm_eps < 1)) fail_input("config: rms_norm_eps is {}; it must be between 0 and 1", c.rms_norm_eps);
  if (!(c.rope_theta >= 1 && std::isfinite(c.rope_theta))) fail_input("config: rope_theta is {}; it must be at least 1", c.rope_theta);
  if (c.is_mla()) {
    check_mla(c);
  } else {
    check_range("head_dim", c.head_dim, 2, 1 << 14);
    check_range("num_key_value_heads", c.num_key_value_heads, 1, c.num_attention_heads);
    if (c.num_attention_heads % c.num_key_value_heads != 0)
      fail_input("config: {} query heads are not a multiple of {} key-value heads", c.num_attention_heads, c.num_key_value_heads);
  }
  if (c.rope_dim() % 2 != 0) fail_input("config: the rotary width {} is odd", c.rope_dim());
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeScaling::Type::none) return;
  if (!(s.factor >= 1 && s.factor <= 1e6)) fail_input("config: the rope scaling factor is {}; it must be at least 1", s.factor);
  if (s.type != RopeScaling::Type::linear) check_range("original_max_position_embeddings", s.original_max_position_embeddings, 1, 1 << 30);
}

RouterConfig Config::router() const {
  return {topk_method, n_routed_experts, num_experts_per_tok, n_group, topk_group, norm_topk_prob, float(routed_scaling_factor)};
}

double Config::softmax_scale() const {
  const double scale = 1 / std::sqrt(double(query_dim()));
  const RopeScaling& s = rope_scaling;
  if (!is_mla() || s.type != RopeScaling::Type::yarn || s.mscale_all_dim == 0 || s.factor <= 1) return scale;
  const double mscale = 0.1 * s.mscale_all_dim * std::log(s.factor) + 1;
  return scale * mscale * mscale;
}

namespace {

int64_t attention_parameters(const Config& c) {
  const int64_t D = c.hidden_size, n_h = c.num_attention_heads, d_q = c.query_dim();
  if (!c.is_mla()) return D * c.head_dim * (2 * n_h + 2 * c.num_key_value_heads);
  const int64_t q = c.q_lora_rank > 0 ? c.q_lora_rank * (D + n_h * d_q + 1) : D * n_h * d_q;
  return q + D * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * (n_h * (c.qk_nope_head_dim + c.v_head_dim) + 1) +
         n_h * c.v_head_dim * D;
}

// Parameters of all layers, with `experts` routed experts in the mixture layers.
int64_t layer_parameters(const Config& c, int64_t experts) {
  int64_t total = 0;
  for (int l = 0; l < c.num_hidden_layers; ++l) {
    total += attention_parameters(c) + 2 * c.hidden_size;
    if (c.is_moe_layer(l))
      total += 3 * c.hidden_size * c.moe_intermediate_size * (experts + c.n_shared_experts) + c.n_routed_experts * c.hidden_size;
    else
      total += 3 * c.hidden_size * c.intermediate_size;
  }
  return total + c.hidden_size;
}

}  // namespace

int64_t Config::parameters() const {
  return vocab_size * hidden_size * (tie_word_embeddings ? 1 : 2) + layer_parameters(*this, n_routed_experts);
}

int64_t Config::active_parameters() const { return vocab_size * hidden_size + hidden_size + layer_parameters(*this, num_experts_per_tok); }

Config read_config(const Checkpoint& checkpoint) {
  return checkpoint.format() == Format::hf ? parse_hf_config(checkpoint.metadata()) : parse_gguf_config(checkpoint);
}

}  // namespace mla
