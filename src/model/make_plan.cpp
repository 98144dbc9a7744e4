// The list of tensors and the choice of their types; the choice follows llama.cpp's, so that files compare.
#include "model/make_plan.h"

#include "core/check.h"
#include "io/names.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace mla {
namespace {

class Planner {
 public:
  Planner(const Config& config, Format format, DType wanted, const std::vector<std::string>& biases, std::vector<std::string>& notes)
      : config_(config), gguf_(format == Format::gguf), wanted_(wanted), biases_(biases), notes_(notes) {}

  std::vector<TensorPlan> plan() {
    const Config& c = config_;
    matrix("embed", {c.vocab_size, c.hidden_size}, c.tie_word_embeddings ? head_type() : plain_type());
    for (int l = 0; l < c.num_hidden_layers; ++l) {
      prefix_ = fmt::format("layers.{}.", l);
      vector("attn_norm", c.hidden_size);
      if (c.is_mla())
        mla();
      else
        gqa();
      vector("ffn_norm", c.hidden_size);
      if (c.is_moe_layer(l))
        moe();
      else
        ffn("ffn.", "", c.intermediate_size);
    }
    prefix_.clear();
    vector("norm", c.hidden_size);
    if (!c.tie_word_embeddings) matrix("lm_head", {c.vocab_size, c.hidden_size}, head_type());
    if (gguf_ && c.rope_scaling.type == RopeScaling::Type::llama3) vector("rope_freqs", c.rope_dim() / 2);
    return std::move(out_);
  }

 private:
  // The product with the head decides the next token: it keeps more bits than the layers.
  DType head_type() const { return is_quantised(wanted_) && wanted_ != DType::q8_0 ? DType::q6_k : plain_type(); }
  // As DeepSeek does it, the layers' matrices are fp8 and all else is bf16.
  DType plain_type() const { return wanted_ == DType::f8 ? DType::bf16 : wanted_; }

  DType fitting(const std::string& name, DType type, int64_t cols) {
    if (cols % info(type).block == 0) return type;
    const DType instead = cols % info(DType::q8_0).block == 0 ? DType::q8_0 : DType::f16;
    const std::string note = fmt::format("{} is stored as {}: its rows of {} are no multiple of {}'s block of {}", name, info(instead).name,
                                         cols, info(type).name, info(type).block);
    if (std::find(notes_.begin(), notes_.end(), note) == notes_.end()) notes_.push_back(note);
    return instead;
  }

  void matrix(const std::string& name, std::vector<int64_t> shape, DType type) {
    const DType chosen = fitting(name, type, shape.back());
    const int64_t rows = shape[shape.size() - 2];
    const std::vector<int64_t> blocks{f8_blocks(rows), f8_blocks(shape.back())};
    out_.push_back({prefix_ + name, chosen, std::move(shape)});
    if (chosen == DType::f8) out_.push_back({prefix_ + name + std::string(scales_suffix), DType::f32, blocks});
    if (std::binary_search(biases_.begin(), biases_.end(), prefix_ + name + ".bias")) vector(name + ".bias", rows);
  }
  void matrix(const std::string& name, std::vector<int64_t> shape) { matrix(name, std::move(shape), wanted_); }

  // llama.cpp adds and multiplies with f32 vectors only.
  void vector(const std::string& name, int64_t n) { out_.push_back({prefix_ + name, gguf_ ? DType::f32 : plain_type(), {n}}); }

  void gqa() {
    const int64_t D = config_.hidden_size, q = int64_t(config_.num_attention_heads) * config_.head_dim;
    const int64_t kv = int64_t(config_.num_key_value_heads) * config_.head_dim;
    matrix("attn.q", {q, D});
    matrix("attn.k", {kv, D});
    matrix("attn.v", {kv, D});
    matrix("attn.o", {D, q});
  }

  void mla() {
    const Config& c = config_;
    const int64_t D = c.hidden_size, n_h = c.num_attention_heads, d_c = c.kv_lora_rank, d_h = c.qk_nope_head_dim, d_v = c.v_head_dim;
    if (c.q_lora_rank > 0) {
      matrix("attn.q_a", {c.q_lora_rank, D});
      vector("attn.q_a_norm", c.q_lora_rank);
      matrix("attn.q_b", {n_h * c.query_dim(), c.q_lora_rank});
    } else {
      matrix("attn.q", {n_h * c.query_dim(), D});
    }
    matrix("attn.kv_a", {d_c + c.qk_rope_head_dim, D});
    vector("attn.kv_a_norm", d_c);
    if (gguf_) {
      matrix("attn.k_b", {n_h, d_c, d_h});
      matrix("attn.v_b", {n_h, d_v, d_c});
    } else {
      matrix("attn.kv_b", {n_h * (d_h + d_v), d_c});
    }
    matrix("attn.o", {D, n_h * d_v});
  }

  // index: ".17" of an expert that is a tensor of its own
  void ffn(const std::string& name, const std::string& index, int64_t width) {
    const int64_t D = config_.hidden_size;
    matrix(name + "gate" + index, {width, D});
    matrix(name + "up" + index, {width, D});
    matrix(name + "down" + index, {D, width});
  }

  void moe() {
    const Config& c = config_;
    const int64_t D = c.hidden_size, E = c.n_routed_experts, width = c.moe_intermediate_size;
    matrix("ffn.router", {E, D}, gguf_ ? DType::f32 : plain_type());
    if (gguf_) {
      matrix("ffn.experts.gate", {E, width, D});
      matrix("ffn.experts.up", {E, width, D});
      matrix("ffn.experts.down", {E, D, width});
    } else {
      for (int64_t e = 0; e < E; ++e) ffn("ffn.experts.", fmt::format(".{}", e), width);
    }
    if (c.n_shared_experts > 0) ffn("ffn.shared.", "", c.n_shared_experts * width);
  }

  const Config& config_;
  bool gguf_;
  DType wanted_;
  const std::vector<std::string>& biases_;
  std::vector<std::string>& notes_;
  std::string prefix_;
  std::vector<TensorPlan> out_;
};

}  // namespace

std::vector<TensorPlan> plan_tensors(const Config& config, Format format, DType wanted, const std::vector<std::string>& biases,
                                     std::vector<std::string>& notes) {
  return Planner(config, format, wanted, biases, notes).plan();
}

std::vector<std::string> implied_biases(const Config& c) {
  std::vector<std::string> names;
  if (!c.attention_bias) return names;
  for (int l = 0; l < c.num_hidden_layers; ++l) {
    auto add = [&](const char* name) { names.push_back(fmt::format("layers.{}.attn.{}.bias", l, name)); };
    if (c.is_mla()) {
      add("kv_a"), add("o");
      if (c.q_lora_rank > 0) add("q_a");
    } else {
      add("q"), add("k"), add("v");
      if (c.family == Family::llama) add("o");
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

void describe_file(nlohmann::json& metadata, DType type) {
  const auto file_type = [&]() -> uint32_t {  // llama.cpp's numbers
    switch (type) {
      case DType::f32: return 0;
      case DType::f16: return 1;
      case DType::q4_0: return 2;
      case DType::q4_1: return 3;
      case DType::q8_0: return 7;
      case DType::q6_k: return 18;
      case DType::bf16: return 32;
      default: fail_input("files of type {} cannot be written; choose f32, f16, bf16, q8_0, q4_0, q4_1 or q6_k", info(type).name);
    }
  };
  metadata["general.file_type"] = file_type();
  if (is_quantised(type)) metadata["general.quantization_version"] = 2u;
}

}  // namespace mla
