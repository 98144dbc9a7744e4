// What a checkpoint says about its model. Field names are those of Hugging Face's config.json.
#pragma once

#include "device/device.h"

#include <nlohmann/json_fwd.hpp>

#include <optional>
#include <string>
#include <vector>

namespace mla {

class Checkpoint;

enum class Family : uint8_t { deepseek_v2, llama, mistral, qwen2 };

// How rotary frequencies are stretched beyond the trained context.
struct RopeScaling {
  enum class Type : uint8_t { none, linear, yarn, llama3 } type = Type::none;
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32, beta_slow = 1;              // yarn
  double mscale = 0, mscale_all_dim = 0;             // yarn, as DeepSeek uses them; 0: absent
  double attention_factor = 0;                       // yarn; 0: derived
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
};

struct Config {
  Family family = Family::llama;
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0;
  int head_dim = 0;  // llama family
  double rms_norm_eps = 1e-6;
  double latent_norm_eps = 1e-6;  // kv_a_layernorm and q_a_layernorm
  bool tie_word_embeddings = false;
  bool attention_bias = false;  // q, k, v (qwen2 always); deepseek_v2: kv_a and o
  bool mlp_bias = false;
  int64_t max_position_embeddings = 0;
  int sliding_window = 0;  // 0: none
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool rope_interleaved = false;  // pairs (2i, 2i+1) in this file's rows; else (i, i + d/2)

  // Multi-head latent attention (family deepseek_v2)
  int kv_lora_rank = 0;  // d_c
  int q_lora_rank = 0;   // d_c'; 0: queries are not compressed
  int qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;

  // DeepSeekMoE; n_routed_experts 0: dense
  int n_routed_experts = 0, n_shared_experts = 0, num_experts_per_tok = 0;
  int moe_intermediate_size = 0, first_k_dense_replace = 0, moe_layer_freq = 1;
  int n_group = 1, topk_group = 1;
  Gating topk_method = Gating::greedy;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1;

  std::vector<int32_t> eos_token_ids;
  int32_t bos_token_id = -1;
  std::string torch_dtype;  // as the file says; empty if it does not

  bool is_mla() const { return family == Family::deepseek_v2; }
  bool is_moe_layer(int layer) const { return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0; }
  int rope_dim() const { return is_mla() ? qk_rope_head_dim : head_dim; }
  int query_dim() const { return is_mla() ? qk_nope_head_dim + qk_rope_head_dim : head_dim; }  // per head
  KvLayout kv_layout() const {
    return is_mla() ? KvLayout::mla(kv_lora_rank, qk_rope_head_dim) : KvLayout::gqa(num_key_value_heads, head_dim);
  }
  RouterConfig router() const;
  // Softmax scale: query_dim^-0.5, times YaRN's mscale(factor, mscale_all_dim)² (0.114721 in DeepSeek-V2).
  double softmax_scale() const;
  int64_t parameters() const;         // all of them
  int64_t active_parameters() const;  // read for one token, output head included, one row of the embedding
};

// From config.json in either style (rope_theta + rope_scaling, or rope_parameters). Raises Error for what it does not know and
// for sizes that make no sense.
Config parse_hf_config(const nlohmann::json& json);
nlohmann::json to_hf_config(const Config& config);  // the classic style
Config read_config(const Checkpoint& checkpoint);   // HF folder or GGUF metadata
// GGUF metadata as llama.cpp reads it (deepseek2, llama, qwen2), keyed by name.
nlohmann::json to_gguf_metadata(const Config& config);

}  // namespace mla
