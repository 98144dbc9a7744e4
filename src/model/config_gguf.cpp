// The configuration in a GGUF's metadata, by the keys that llama.cpp reads and writes.
#include "core/check.h"
#include "io/checkpoint.h"
#include "model/config_parse.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

using nlohmann::json;

class Keys {
 public:
  explicit Keys(const json& metadata) : metadata_(metadata) {
    const auto it = metadata.find("general.architecture");
    if (it == metadata.end() || !it->is_string()) fail_input("the GGUF does not name its architecture (general.architecture)");
    architecture = it->get<std::string>();
  }

  std::string architecture;

  bool has(const std::string& key) const { return metadata_.contains(architecture + "." + key); }
  int64_t integer(const std::string& key, int64_t otherwise) const {
    const json* v = find(key);
    if (!v) return otherwise;
    // Some files give one value a layer; only equal ones make sense here.
    if (v->is_array()) {
      if (v->empty() || !(*v)[0].is_number_integer()) fail_input("GGUF key {}.{} must be a whole number", architecture, key);
      for (const json& e : *v)
        if (e != (*v)[0]) fail_input("GGUF key {}.{} differs from layer to layer, which is not supported", architecture, key);
      v = &(*v)[0];
    }
    if (!v->is_number_integer()) fail_input("GGUF key {}.{} must be a whole number, not {}", architecture, key, v->dump().substr(0, 60));
    const auto value = v->is_number_unsigned() && v->get<uint64_t>() > uint64_t(INT64_MAX) ? INT64_MAX : v->get<int64_t>();
    if (value < INT32_MIN || value > INT32_MAX) fail_input("GGUF key {}.{} is {}, which is out of range", architecture, key, value);
    return value;
  }
  int small(const std::string& key, int64_t otherwise) const { return int(integer(key, otherwise)); }
  int64_t required(const std::string& key) const {
    if (!find(key)) fail_input("GGUF key {}.{} is missing", architecture, key);
    return integer(key, 0);
  }
  double number(const std::string& key, double otherwise) const {
    const json* v = find(key);
    if (!v) return otherwise;
    if (!v->is_number()) fail_input("GGUF key {}.{} must be a number, not {}", architecture, key, v->dump().substr(0, 60));
    return v->get<double>();
  }
  bool boolean(const std::string& key, bool otherwise) const {
    const json* v = find(key);
    if (!v) return otherwise;
    if (!v->is_boolean()) fail_input("GGUF key {}.{} must be a boolean", architecture, key);
    return v->get<bool>();
  }
  std::string text(const std::string& key, const std::string& otherwise) const {
    const json* v = find(key);
    if (!v) return otherwise;
    if (!v->is_string()) fail_input("GGUF key {}.{} must be a string", architecture, key);
    return v->get<std::string>();
  }

 private:
  const json* find(const std::string& key) const {
    const auto it = metadata_.find(architecture + "." + key);
    return it == metadata_.end() ? nullptr : &*it;
  }
  const json& metadata_;
};

void parse_rope(const Keys& k, Config& c) {
  c.rope_theta = k.number("rope.freq_base", 10000);
  const std::string type = k.text("rope.scaling.type", "none");
  RopeScaling& s = c.rope_scaling;
  if (type == "none") return;
  if (type == "linear")
    s.type = RopeScaling::Type::linear;
  else if (type == "yarn")
    s.type = RopeScaling::Type::yarn;
  else
    fail_input("GGUF: rope scaling '{}' is not supported; known are none, linear and yarn", type);
  s.factor = k.number("rope.scaling.factor", 1);
  s.original_max_position_embeddings = k.integer("rope.scaling.original_context_length", c.max_position_embeddings);
  s.beta_fast = k.number("rope.scaling.yarn_beta_fast", 32);
  s.beta_slow = k.number("rope.scaling.yarn_beta_slow", 1);
  // llama.cpp keeps 0.1 · mscale_all_dim and takes both mscales as equal; where they differ we add a key of our own. Numbers were stored
  // as floats: round them back.
  s.mscale_all_dim = std::round(k.number("rope.scaling.yarn_log_multiplier", 0) * 1e7) / 1e6;
  s.mscale = std::round(k.number("rope.scaling.mscale", s.mscale_all_dim) * 1e6) / 1e6;
  s.attention_factor = k.number("rope.scaling.yarn_attention_factor", 0);
}

void parse_deepseek2(const Keys& k, Config& c) {
  c.family = Family::deepseek_v2;
  c.rope_interleaved = true;
  c.kv_lora_rank = int(k.required("attention.kv_lora_rank"));
  c.q_lora_rank = k.small("attention.q_lora_rank", 0);
  c.qk_rope_head_dim = int(k.required("rope.dimension_count"));
  // Split files say the latent's widths in key_length and the head's in key_length_mla; older fused ones have the head's alone.
  const int64_t query = k.has("attention.key_length_mla") ? k.required("attention.key_length_mla") : k.required("attention.key_length");
  c.qk_nope_head_dim = int(query) - c.qk_rope_head_dim;
  c.v_head_dim = int(k.has("attention.value_length_mla") ? k.required("attention.value_length_mla") : k.required("attention.value_length"));
  c.num_key_value_heads = c.num_attention_heads;
  c.n_routed_experts = k.small("expert_count", 0);
  c.n_shared_experts = k.small("expert_shared_count", 0);
  c.num_experts_per_tok = k.small("expert_used_count", 0);
  c.moe_intermediate_size = k.small("expert_feed_forward_length", 0);
  c.first_k_dense_replace = k.small("leading_dense_block_count", 0);
  c.norm_topk_prob = k.boolean("expert_weights_norm", false);
  c.routed_scaling_factor = k.number("expert_weights_scale", 1);
  if (c.routed_scaling_factor == 0) c.routed_scaling_factor = 1;
  if (const int64_t gate = k.integer("expert_gating_func", 1); gate != 1 && gate != 0)
    fail_input("GGUF: expert_gating_func {} is not supported; DeepSeek-V2 uses softmax (1)", gate);
  c.n_group = k.small("expert_group_count", 1);
  c.topk_group = k.small("expert_group_used_count", 1);
  if (c.n_group > 1) c.topk_method = Gating::group_limited_greedy;
}

}  // namespace

Config parse_gguf_config(const Checkpoint& checkpoint) {
  const json& metadata = checkpoint.metadata();
  const Keys k(metadata);
  Config c;
  if (k.architecture != "deepseek2" && k.architecture != "llama" && k.architecture != "qwen2")
    fail_input("GGUF architecture '{}' is not supported; known are deepseek2, llama and qwen2", k.architecture);
  const StoredTensor* embed = checkpoint.find("embed");
  if (!embed || embed->value.rank != 2)
    fail_input("{} holds no token embeddings: it is a vocabulary, not a model", checkpoint.path().string());
  c.vocab_size = embed->value.shape[0];
  c.hidden_size = k.required("embedding_length");
  c.num_hidden_layers = int(k.required("block_count"));
  c.intermediate_size = k.required("feed_forward_length");
  c.num_attention_heads = int(k.required("attention.head_count"));
  if (c.num_attention_heads < 1) fail_input("GGUF: attention.head_count is {}; it must be at least 1", c.num_attention_heads);
  c.num_key_value_heads = k.small("attention.head_count_kv", c.num_attention_heads);
  c.max_position_embeddings = k.integer("context_length", 2048);
  c.rms_norm_eps = k.number("attention.layer_norm_rms_epsilon", 1e-6);
  c.sliding_window = k.small("attention.sliding_window", 0);
  c.tie_word_embeddings = checkpoint.find("lm_head") == nullptr;
  if (k.architecture == "deepseek2") {
    parse_deepseek2(k, c);
  } else {
    c.family = k.architecture == "qwen2" ? Family::qwen2 : Family::llama;
    c.rope_interleaved = c.family == Family::llama;  // the converter permutes Llama's rows to pairs, and leaves Qwen's
    c.attention_bias = c.family == Family::qwen2;
    c.head_dim = k.small("attention.key_length", c.hidden_size / c.num_attention_heads);
    if (k.integer("rope.dimension_count", c.head_dim) != c.head_dim)
      fail_input("GGUF: rotary width {} is not the head's {}, which is not supported", k.integer("rope.dimension_count", 0), c.head_dim);
  }
  parse_rope(k, c);
  auto token = [&](const char* key) {
    const auto it = metadata.find(key);
    return it != metadata.end() && it->is_number_integer() ? int32_t(std::clamp<int64_t>(it->get<int64_t>(), -1, INT32_MAX)) : -1;
  };
  c.bos_token_id = token("tokenizer.ggml.bos_token_id");
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"})
    if (const int32_t id = token(key); id >= 0 && (c.eos_token_ids.empty() || c.eos_token_ids[0] != id)) c.eos_token_ids.push_back(id);
  check_config(c);
  return c;
}

json to_gguf_metadata(const Config& c) {
  const std::string a = c.is_mla() ? "deepseek2" : c.family == Family::qwen2 ? "qwen2" : "llama";
  json m = {{"general.architecture", a},
            {a + ".context_length", c.max_position_embeddings},
            {a + ".embedding_length", c.hidden_size},
            {a + ".block_count", c.num_hidden_layers},
            {a + ".feed_forward_length", c.intermediate_size},
            {a + ".attention.head_count", c.num_attention_heads},
            {a + ".attention.head_count_kv", c.is_mla() ? 1 : c.num_key_value_heads},
            {a + ".attention.layer_norm_rms_epsilon", c.rms_norm_eps},
            {a + ".rope.freq_base", c.rope_theta},
            {a + ".rope.dimension_count", c.rope_dim()},
            {a + ".vocab_size", c.vocab_size}};
  if (c.sliding_window > 0) m[a + ".attention.sliding_window"] = c.sliding_window;
  if (c.is_mla()) {
    m[a + ".attention.kv_lora_rank"] = c.kv_lora_rank;
    if (c.q_lora_rank > 0) m[a + ".attention.q_lora_rank"] = c.q_lora_rank;
    m[a + ".attention.key_length"] = c.kv_lora_rank + c.qk_rope_head_dim;
    m[a + ".attention.value_length"] = c.kv_lora_rank;
    m[a + ".attention.key_length_mla"] = c.query_dim();
    m[a + ".attention.value_length_mla"] = c.v_head_dim;
    m[a + ".leading_dense_block_count"] = c.n_routed_experts > 0 ? c.first_k_dense_replace : c.num_hidden_layers;
    m[a + ".expert_count"] = c.n_routed_experts;
    m[a + ".expert_used_count"] = c.num_experts_per_tok;
    m[a + ".expert_shared_count"] = c.n_shared_experts;
    m[a + ".expert_feed_forward_length"] = c.moe_intermediate_size;
    m[a + ".expert_weights_scale"] = c.routed_scaling_factor;
    m[a + ".expert_weights_norm"] = c.norm_topk_prob;
    m[a + ".expert_gating_func"] = 1;
    if (c.topk_method == Gating::group_limited_greedy) {
      m[a + ".expert_group_count"] = c.n_group;
      m[a + ".expert_group_used_count"] = c.topk_group;
    }
  } else {
    m[a + ".attention.key_length"] = c.head_dim;
    m[a + ".attention.value_length"] = c.head_dim;
  }
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeScaling::Type::linear || s.type == RopeScaling::Type::yarn) {
    m[a + ".rope.scaling.type"] = s.type == RopeScaling::Type::linear ? "linear" : "yarn";
    m[a + ".rope.scaling.factor"] = s.factor;
    if (s.original_max_position_embeddings > 0) m[a + ".rope.scaling.original_context_length"] = s.original_max_position_embeddings;
    if (s.mscale_all_dim > 0) m[a + ".rope.scaling.yarn_log_multiplier"] = 0.1 * s.mscale_all_dim;
    if (s.mscale != s.mscale_all_dim) m[a + ".rope.scaling.mscale"] = s.mscale;
    if (s.attention_factor > 0) m[a + ".rope.scaling.yarn_attention_factor"] = s.attention_factor;
    if (s.beta_fast != 32) m[a + ".rope.scaling.yarn_beta_fast"] = s.beta_fast;
    if (s.beta_slow != 1) m[a + ".rope.scaling.yarn_beta_slow"] = s.beta_slow;
  }
  if (c.bos_token_id >= 0) m["tokenizer.ggml.bos_token_id"] = c.bos_token_id;
  if (!c.eos_token_ids.empty()) m["tokenizer.ggml.eos_token_id"] = c.eos_token_ids[0];
  return m;
}

}  // namespace mla
