// config.json, in the classic style (rope_theta, rope_scaling, torch_dtype) and in that of transformers 5 (rope_parameters, dtype).
#include "core/check.h"
#include "model/config_parse.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

namespace mla {
namespace {

using nlohmann::json;

const json* find(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

int64_t integer(const json& object, const char* key, int64_t otherwise) {
  const json* value = find(object, key);
  if (!value) return otherwise;
  if (!value->is_number_integer()) fail_input("config: {} must be a whole number, not {}", key, value->dump().substr(0, 60));
  if (value->is_number_unsigned() && value->get<uint64_t>() > uint64_t(INT64_MAX)) fail_input("config: {} is too large", key);
  return value->get<int64_t>();
}

int64_t required(const json& object, const char* key) {
  if (!find(object, key)) fail_input("config: {} is missing", key);
  return integer(object, key, 0);
}

// For fields held in an int: the range is checked here, sense in check_config.
int small(const json& object, const char* key, int otherwise) {
  const int64_t value = integer(object, key, otherwise);
  if (value < INT32_MIN || value > INT32_MAX) fail_input("config: {} is {}, which is out of range", key, value);
  return int(value);
}

double number(const json& object, const char* key, double otherwise) {
  const json* value = find(object, key);
  if (!value) return otherwise;
  if (!value->is_number()) fail_input("config: {} must be a number, not {}", key, value->dump().substr(0, 60));
  return value->get<double>();
}

bool boolean(const json& object, const char* key, bool otherwise) {
  const json* value = find(object, key);
  if (!value) return otherwise;
  if (!value->is_boolean()) fail_input("config: {} must be true or false, not {}", key, value->dump().substr(0, 60));
  return value->get<bool>();
}

std::string text(const json& object, const char* key, const std::string& otherwise) {
  const json* value = find(object, key);
  if (!value) return otherwise;
  if (!value->is_string()) fail_input("config: {} must be a string, not {}", key, value->dump().substr(0, 60));
  return value->get<std::string>();
}

constexpr std::array<std::pair<std::string_view, Family>, 4> families{
    {{"deepseek_v2", Family::deepseek_v2}, {"llama", Family::llama}, {"mistral", Family::mistral}, {"qwen2", Family::qwen2}}};

Family parse_family(const std::string& model_type) {
  for (const auto& [name, family] : families)
    if (name == model_type) return family;
  fail_input("config: model_type '{}' is not supported; choose a model of type deepseek_v2, llama, mistral or qwen2", model_type);
}

RopeScaling parse_rope_scaling(const json& j, int64_t max_position_embeddings) {
  RopeScaling s;
  const std::string type = text(j, "rope_type", text(j, "type", "default"));
  if (type == "default") return s;
  if (type == "linear")
    s.type = RopeScaling::Type::linear;
  else if (type == "yarn")
    s.type = RopeScaling::Type::yarn;
  else if (type == "llama3")
    s.type = RopeScaling::Type::llama3;
  else
    fail_input("config: rope scaling '{}' is not supported; known are default, linear, yarn and llama3", type);
  s.factor = number(j, "factor", 1);
  s.original_max_position_embeddings = integer(j, "original_max_position_embeddings", max_position_embeddings);
  s.beta_fast = number(j, "beta_fast", 32);
  s.beta_slow = number(j, "beta_slow", 1);
  s.mscale = number(j, "mscale", 0);
  s.mscale_all_dim = number(j, "mscale_all_dim", 0);
  s.attention_factor = number(j, "attention_factor", 0);
  s.low_freq_factor = number(j, "low_freq_factor", 1);
  s.high_freq_factor = number(j, "high_freq_factor", 4);
  if (s.type == RopeScaling::Type::llama3 && !(s.high_freq_factor > s.low_freq_factor))
    fail_input("config: high_freq_factor {} must exceed low_freq_factor {}", s.high_freq_factor, s.low_freq_factor);
  return s;
}

void parse_rope(const json& j, Config& c) {
  const json* parameters = find(j, "rope_parameters");
  const json* scaling = parameters ? parameters : find(j, "rope_scaling");
  c.rope_theta = number(parameters ? *parameters : j, "rope_theta", number(j, "rope_theta", 10000));
  if (!scaling) return;
  if (!scaling->is_object()) fail_input("config: {} must be an object", parameters ? "rope_parameters" : "rope_scaling");
  c.rope_scaling = parse_rope_scaling(*scaling, c.max_position_embeddings);
}

// DeepSeek-V2's own fields; defaults are those of transformers' DeepseekV2Config where the field is optional there.
void parse_deepseek(const json& j, Config& c) {
  c.rope_interleaved = true;
  required(j, "kv_lora_rank");
  c.kv_lora_rank = small(j, "kv_lora_rank", 0);
  c.q_lora_rank = small(j, "q_lora_rank", 0);
  c.qk_nope_head_dim = small(j, "qk_nope_head_dim", 128);
  c.qk_rope_head_dim = small(j, "qk_rope_head_dim", 64);
  c.v_head_dim = small(j, "v_head_dim", 128);
  c.n_routed_experts = small(j, "n_routed_experts", 0);
  c.n_shared_experts = small(j, "n_shared_experts", 0);
  c.num_experts_per_tok = small(j, "num_experts_per_tok", 0);
  c.moe_intermediate_size = small(j, "moe_intermediate_size", 0);
  c.first_k_dense_replace = small(j, "first_k_dense_replace", 0);
  c.moe_layer_freq = small(j, "moe_layer_freq", 1);
  c.n_group = small(j, "n_group", 1);
  c.topk_group = small(j, "topk_group", 1);
  c.norm_topk_prob = boolean(j, "norm_topk_prob", false);
  c.routed_scaling_factor = number(j, "routed_scaling_factor", 1);
  const std::string method = text(j, "topk_method", "greedy");
  if (method == "group_limited_greedy")
    c.topk_method = Gating::group_limited_greedy;
  else if (method != "greedy")
    fail_input("config: topk_method '{}' is not supported; known are greedy and group_limited_greedy", method);
  const std::string scoring = text(j, "scoring_func", "softmax");
  if (scoring != "softmax") fail_input("config: scoring_func '{}' is not supported; DeepSeek-V2 uses softmax", scoring);
}

void parse_tokens(const json& j, Config& c) {
  if (const json* eos = find(j, "eos_token_id")) {
    const json list = eos->is_array() ? *eos : json::array({*eos});
    if (list.size() > 64) fail_input("config: eos_token_id has {} entries", list.size());
    for (const json& id : list) {
      if (!id.is_number_integer()) fail_input("config: eos_token_id must hold whole numbers");
      c.eos_token_ids.push_back(int32_t(std::clamp<int64_t>(id.get<int64_t>(), -1, INT32_MAX)));
    }
  }
  if (const json* bos = find(j, "bos_token_id"); bos && bos->is_number_integer()) c.bos_token_id = small(j, "bos_token_id", -1);
}

}  // namespace

Config parse_hf_config(const json& j) {
  if (!j.is_object()) fail_input("config: config.json must hold an object");
  Config c;
  if (!find(j, "model_type")) fail_input("config: model_type is missing; it names the model's family");
  c.family = parse_family(text(j, "model_type", ""));
  c.vocab_size = required(j, "vocab_size");
  c.hidden_size = required(j, "hidden_size");
  c.intermediate_size = required(j, "intermediate_size");
  c.num_hidden_layers = int(std::clamp<int64_t>(required(j, "num_hidden_layers"), INT32_MIN, INT32_MAX));
  c.num_attention_heads = int(std::clamp<int64_t>(required(j, "num_attention_heads"), INT32_MIN, INT32_MAX));
  if (c.num_attention_heads < 1) fail_input("config: num_attention_heads is {}; it must be at least 1", c.num_attention_heads);
  c.num_key_value_heads = small(j, "num_key_value_heads", c.num_attention_heads);
  c.max_position_embeddings = integer(j, "max_position_embeddings", 2048);
  c.rms_norm_eps = number(j, "rms_norm_eps", 1e-6);
  c.tie_word_embeddings = boolean(j, "tie_word_embeddings", false);
  c.attention_bias = boolean(j, "attention_bias", c.family == Family::qwen2);
  c.mlp_bias = boolean(j, "mlp_bias", false);
  if (c.mlp_bias) fail_input("config: mlp_bias true is not supported");
  if (const std::string act = text(j, "hidden_act", "silu"); act != "silu")
    fail_input("config: hidden_act '{}' is not supported; only silu is", act);
  if (c.family == Family::deepseek_v2)
    parse_deepseek(j, c);
  else
    c.head_dim = small(j, "head_dim", int(c.hidden_size / c.num_attention_heads));
  if (c.family == Family::mistral || (c.family == Family::qwen2 && boolean(j, "use_sliding_window", false)))
    c.sliding_window = small(j, "sliding_window", 0);
  if (c.family == Family::qwen2 && c.sliding_window > 0 && small(j, "max_window_layers", 0) > 0)
    fail_input("config: sliding windows in some layers only (max_window_layers) are not supported");
  parse_rope(j, c);
  parse_tokens(j, c);
  c.torch_dtype = text(j, "dtype", text(j, "torch_dtype", ""));
  check_config(c);
  return c;
}

namespace {

json rope_scaling_json(const RopeScaling& s) {
  switch (s.type) {
    case RopeScaling::Type::none: return nullptr;
    case RopeScaling::Type::linear: return {{"type", "linear"}, {"rope_type", "linear"}, {"factor", s.factor}};
    case RopeScaling::Type::llama3:
      return {{"rope_type", "llama3"},
              {"factor", s.factor},
              {"low_freq_factor", s.low_freq_factor},
              {"high_freq_factor", s.high_freq_factor},
              {"original_max_position_embeddings", s.original_max_position_embeddings}};
    case RopeScaling::Type::yarn: break;
  }
  json j = {{"type", "yarn"},           {"rope_type", "yarn"},
            {"factor", s.factor},       {"beta_fast", s.beta_fast},
            {"beta_slow", s.beta_slow}, {"original_max_position_embeddings", s.original_max_position_embeddings}};
  if (s.mscale > 0) j["mscale"] = s.mscale;
  if (s.mscale_all_dim > 0) j["mscale_all_dim"] = s.mscale_all_dim;
  if (s.attention_factor > 0) j["attention_factor"] = s.attention_factor;
  return j;
}

json deepseek_json(const Config& c) {
  json j = {{"kv_lora_rank", c.kv_lora_rank},
            {"q_lora_rank", c.q_lora_rank > 0 ? json(c.q_lora_rank) : json(nullptr)},
            {"qk_nope_head_dim", c.qk_nope_head_dim},
            {"qk_rope_head_dim", c.qk_rope_head_dim},
            {"v_head_dim", c.v_head_dim},
            {"head_dim", c.qk_rope_head_dim},
            {"n_routed_experts", c.n_routed_experts},
            {"n_shared_experts", c.n_shared_experts},
            {"num_experts_per_tok", c.num_experts_per_tok},
            {"moe_intermediate_size", c.moe_intermediate_size},
            {"first_k_dense_replace", c.first_k_dense_replace},
            {"moe_layer_freq", c.moe_layer_freq},
            {"n_group", c.n_group},
            {"topk_group", c.topk_group},
            {"topk_method", c.topk_method == Gating::greedy ? "greedy" : "group_limited_greedy"},
            {"scoring_func", "softmax"},
            {"norm_topk_prob", c.norm_topk_prob},
            {"routed_scaling_factor", c.routed_scaling_factor}};
  // transformers wants numbers here, and where first_k_dense_replace leaves no layer of experts its defaults do no harm.
  if (c.n_routed_experts == 0)
    for (const char* key : {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"}) j.erase(key);
  return j;
}

}  // namespace

json to_hf_config(const Config& c) {
  constexpr std::array<const char*, 4> architectures{"DeepseekV2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"};
  json j = {{"architectures", {architectures[size_t(c.family)]}},
            {"model_type", families[size_t(c.family)].first},
            {"vocab_size", c.vocab_size},
            {"hidden_size", c.hidden_size},
            {"intermediate_size", c.intermediate_size},
            {"num_hidden_layers", c.num_hidden_layers},
            {"num_attention_heads", c.num_attention_heads},
            {"num_key_value_heads", c.is_mla() ? c.num_attention_heads : c.num_key_value_heads},
            {"max_position_embeddings", c.max_position_embeddings},
            {"rms_norm_eps", c.rms_norm_eps},
            {"hidden_act", "silu"},
            {"attention_bias", c.attention_bias},
            {"tie_word_embeddings", c.tie_word_embeddings},
            {"rope_theta", c.rope_theta},
            {"rope_scaling", rope_scaling_json(c.rope_scaling)},
            {"torch_dtype", c.torch_dtype.empty() ? "float32" : c.torch_dtype}};
  if (c.is_mla())
    j.update(deepseek_json(c));
  else
    j["head_dim"] = c.head_dim;
  if (c.sliding_window > 0) j["sliding_window"] = c.sliding_window;
  if (c.family == Family::qwen2) j["use_sliding_window"] = c.sliding_window > 0;
  if (c.bos_token_id >= 0) j["bos_token_id"] = c.bos_token_id;
  if (c.eos_token_ids.size() == 1)
    j["eos_token_id"] = c.eos_token_ids[0];
  else if (!c.eos_token_ids.empty())
    j["eos_token_id"] = c.eos_token_ids;
  return j;
}

}  // namespace mla
