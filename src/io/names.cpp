// The table of tensor names, and the matching of its patterns.
#include "io/names.h"

#include <charconv>

namespace mla {
namespace {

// '#' stands for a number: the layer, then the expert. An empty name: the format has no such tensor.
struct Row {
  std::string_view ours, hf, gguf;
};

constexpr Row table[] = {
    {"embed", "model.embed_tokens", "token_embd"},
    {"norm", "model.norm", "output_norm"},
    {"lm_head", "lm_head", "output"},
    {"rope_freqs", "", "rope_freqs"},  // Llama 3's rope scaling as one divisor a frequency; HF has it in config.json
    {"layers.#.attn_norm", "model.layers.#.input_layernorm", "blk.#.attn_norm"},
    {"layers.#.ffn_norm", "model.layers.#.post_attention_layernorm", "blk.#.ffn_norm"},

    {"layers.#.attn.q", "model.layers.#.self_attn.q_proj", "blk.#.attn_q"},
    {"layers.#.attn.k", "model.layers.#.self_attn.k_proj", "blk.#.attn_k"},
    {"layers.#.attn.v", "model.layers.#.self_attn.v_proj", "blk.#.attn_v"},
    {"layers.#.attn.o", "model.layers.#.self_attn.o_proj", "blk.#.attn_output"},

    {"layers.#.attn.q_a", "model.layers.#.self_attn.q_a_proj", "blk.#.attn_q_a"},
    {"layers.#.attn.q_a_norm", "model.layers.#.self_attn.q_a_layernorm", "blk.#.attn_q_a_norm"},
    {"layers.#.attn.q_b", "model.layers.#.self_attn.q_b_proj", "blk.#.attn_q_b"},
    {"layers.#.attn.kv_a", "model.layers.#.self_attn.kv_a_proj_with_mqa", "blk.#.attn_kv_a_mqa"},
    {"layers.#.attn.kv_a_norm", "model.layers.#.self_attn.kv_a_layernorm", "blk.#.attn_kv_a_norm"},
    {"layers.#.attn.kv_b", "model.layers.#.self_attn.kv_b_proj", "blk.#.attn_kv_b"},
    {"layers.#.attn.k_b", "", "blk.#.attn_k_b"},  // [n_h, d_c, d_h]: kv_b's key half, transposed
    {"layers.#.attn.v_b", "", "blk.#.attn_v_b"},  // [n_h, d_v, d_c]: kv_b's value half

    {"layers.#.ffn.gate", "model.layers.#.mlp.gate_proj", "blk.#.ffn_gate"},
    {"layers.#.ffn.up", "model.layers.#.mlp.up_proj", "blk.#.ffn_up"},
    {"layers.#.ffn.down", "model.layers.#.mlp.down_proj", "blk.#.ffn_down"},

    {"layers.#.ffn.router", "model.layers.#.mlp.gate", "blk.#.ffn_gate_inp"},
    {"layers.#.ffn.experts.gate", "", "blk.#.ffn_gate_exps"},
    {"layers.#.ffn.experts.up", "", "blk.#.ffn_up_exps"},
    {"layers.#.ffn.experts.down", "", "blk.#.ffn_down_exps"},
    {"layers.#.ffn.experts.gate.#", "model.layers.#.mlp.experts.#.gate_proj", ""},
    {"layers.#.ffn.experts.up.#", "model.layers.#.mlp.experts.#.up_proj", ""},
    {"layers.#.ffn.experts.down.#", "model.layers.#.mlp.experts.#.down_proj", ""},
    {"layers.#.ffn.shared.gate", "model.layers.#.mlp.shared_experts.gate_proj", "blk.#.ffn_gate_shexp"},
    {"layers.#.ffn.shared.up", "model.layers.#.mlp.shared_experts.up_proj", "blk.#.ffn_up_shexp"},
    {"layers.#.ffn.shared.down", "model.layers.#.mlp.shared_experts.down_proj", "blk.#.ffn_down_shexp"},
};

struct Fused {
  std::string_view hf, parts[2];
};

constexpr Fused fused[] = {
    {"model.layers.#.mlp.experts.gate_up_proj", {"layers.#.ffn.experts.gate", "layers.#.ffn.experts.up"}},
    {"model.layers.#.mlp.experts.down_proj", {"layers.#.ffn.experts.down", ""}},
};

// fp8 weights have their scales beside them; "inv" since products are multiplied by them.
constexpr std::string_view weight = ".weight", bias = ".bias", scales = "_scale_inv";

struct Numbers {
  int value[2] = {};
  int count = 0;
};

// Reads the numbers out of a name of this pattern. One spelling a number: no sign, no leading zero, at most five digits.
std::optional<Numbers> match(std::string_view pattern, std::string_view name) {
  Numbers numbers;
  for (char c : pattern) {
    if (c != '#') {
      if (name.empty() || name[0] != c) return std::nullopt;
      name.remove_prefix(1);
      continue;
    }
    int& n = numbers.value[numbers.count++];
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), n);
    const size_t digits = size_t(end - name.data());
    if (error != std::errc{} || n < 0 || digits > 5 || (name[0] == '0' && digits > 1) || name[0] == '-') return std::nullopt;
    name.remove_prefix(digits);
  }
  if (!name.empty()) return std::nullopt;
  return numbers;
}

std::string fill(std::string_view pattern, const Numbers& numbers) {
  std::string name;
  int next = 0;
  for (char c : pattern) c == '#' ? name += std::to_string(numbers.value[next++]) : name += c;
  return name;
}

bool take_suffix(std::string_view& name, std::string_view suffix) {
  if (!name.ends_with(suffix)) return false;
  name.remove_suffix(suffix.size());
  return true;
}

constexpr std::string_view Row::*column(Format format) { return format == Format::hf ? &Row::hf : &Row::gguf; }

}  // namespace

std::optional<std::string> our_name(Format format, std::string_view stored) {
  const bool is_scales = format == Format::hf && take_suffix(stored, scales), is_bias = !is_scales && take_suffix(stored, bias);
  if (!is_bias && !take_suffix(stored, weight)) return std::nullopt;
  for (const Row& row : table) {
    const std::string_view pattern = row.*column(format);
    if (pattern.empty()) continue;
    if (const auto numbers = match(pattern, stored))
      return fill(row.ours, *numbers).append(is_bias ? bias : is_scales ? scales_suffix : "");
  }
  return std::nullopt;
}

std::optional<std::string> stored_name(Format format, std::string_view ours) {
  const bool is_scales = take_suffix(ours, scales_suffix), is_bias = take_suffix(ours, bias);
  if (is_scales && format != Format::hf) return std::nullopt;
  for (const Row& row : table) {
    const std::string_view pattern = row.*column(format);
    if (pattern.empty()) continue;
    if (const auto numbers = match(row.ours, ours))
      return fill(pattern, *numbers).append(is_bias ? bias : weight).append(is_scales ? scales : "");
  }
  return std::nullopt;
}

bool names_scales(Format format, std::string_view stored) { return format == Format::hf && stored.ends_with(scales); }

std::vector<std::string> fused_experts(Format format, std::string_view stored) {
  std::vector<std::string> parts;
  if (format != Format::hf) return parts;
  take_suffix(stored, scales);
  for (const Fused& row : fused)
    if (const auto numbers = match(row.hf, stored))
      for (std::string_view part : row.parts)
        if (!part.empty()) parts.push_back(fill(part, *numbers));
  return parts;
}

}  // namespace mla
