// The table of names: every row goes there and back, and look-alikes are left alone.
#include "io/names.h"

#include <gtest/gtest.h>

namespace mla::test {
namespace {

struct Known {
  const char *ours, *hf, *gguf;  // null: the format has no such tensor
};

constexpr Known known[] = {
    {"embed", "model.embed_tokens.weight", "token_embd.weight"},
    {"norm", "model.norm.weight", "output_norm.weight"},
    {"lm_head", "lm_head.weight", "output.weight"},
    {"rope_freqs", nullptr, "rope_freqs.weight"},
    {"layers.0.attn_norm", "model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"},
    {"layers.59.ffn_norm", "model.layers.59.post_attention_layernorm.weight", "blk.59.ffn_norm.weight"},
    {"layers.3.attn.q.bias", "model.layers.3.self_attn.q_proj.bias", "blk.3.attn_q.bias"},
    {"layers.3.attn.k", "model.layers.3.self_attn.k_proj.weight", "blk.3.attn_k.weight"},
    {"layers.3.attn.v.bias", "model.layers.3.self_attn.v_proj.bias", "blk.3.attn_v.bias"},
    {"layers.3.attn.o", "model.layers.3.self_attn.o_proj.weight", "blk.3.attn_output.weight"},
    {"layers.3.attn.q_a.bias", "model.layers.3.self_attn.q_a_proj.bias", "blk.3.attn_q_a.bias"},
    {"layers.3.attn.q_a_norm", "model.layers.3.self_attn.q_a_layernorm.weight", "blk.3.attn_q_a_norm.weight"},
    {"layers.3.attn.q_b", "model.layers.3.self_attn.q_b_proj.weight", "blk.3.attn_q_b.weight"},
    {"layers.12.attn.kv_a.bias", "model.layers.12.self_attn.kv_a_proj_with_mqa.bias", "blk.12.attn_kv_a_mqa.bias"},
    {"layers.12.attn.kv_a_norm", "model.layers.12.self_attn.kv_a_layernorm.weight", "blk.12.attn_kv_a_norm.weight"},
    {"layers.12.attn.kv_b", "model.layers.12.self_attn.kv_b_proj.weight", "blk.12.attn_kv_b.weight"},
    {"layers.12.attn.kv_b.scales", "model.layers.12.self_attn.kv_b_proj.weight_scale_inv", nullptr},
    {"layers.12.attn.k_b", nullptr, "blk.12.attn_k_b.weight"},
    {"layers.12.attn.v_b", nullptr, "blk.12.attn_v_b.weight"},
    {"layers.7.ffn.gate", "model.layers.7.mlp.gate_proj.weight", "blk.7.ffn_gate.weight"},
    {"layers.7.ffn.up", "model.layers.7.mlp.up_proj.weight", "blk.7.ffn_up.weight"},
    {"layers.7.ffn.down", "model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"},
    {"layers.7.ffn.router", "model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"},
    {"layers.7.ffn.experts.gate", nullptr, "blk.7.ffn_gate_exps.weight"},
    {"layers.7.ffn.experts.up", nullptr, "blk.7.ffn_up_exps.weight"},
    {"layers.7.ffn.experts.down", nullptr, "blk.7.ffn_down_exps.weight"},
    {"layers.7.ffn.experts.gate.159", "model.layers.7.mlp.experts.159.gate_proj.weight", nullptr},
    {"layers.7.ffn.experts.up.0", "model.layers.7.mlp.experts.0.up_proj.weight", nullptr},
    {"layers.7.ffn.experts.down.10", "model.layers.7.mlp.experts.10.down_proj.weight", nullptr},
    {"layers.7.ffn.shared.gate", "model.layers.7.mlp.shared_experts.gate_proj.weight", "blk.7.ffn_gate_shexp.weight"},
    {"layers.7.ffn.shared.up", "model.layers.7.mlp.shared_experts.up_proj.weight", "blk.7.ffn_up_shexp.weight"},
    {"layers.7.ffn.shared.down", "model.layers.7.mlp.shared_experts.down_proj.weight", "blk.7.ffn_down_shexp.weight"},
};

TEST(Names, every_row_goes_there_and_back) {
  for (const Known& row : known)
    for (Format format : {Format::hf, Format::gguf}) {
      const char* stored = format == Format::hf ? row.hf : row.gguf;
      const auto there = stored_name(format, row.ours);
      EXPECT_EQ(there.has_value(), stored != nullptr) << row.ours;
      if (!stored) continue;
      EXPECT_EQ(there, stored);
      EXPECT_EQ(our_name(format, stored), row.ours) << stored;
    }
}

TEST(Names, look_alikes_are_outside_the_table) {
  for (const char* name : {"", ".weight", "norm", "model.norm", "model.norm.weight.weight", "model.layers.-1.mlp.gate.weight",
                           "model.layers.01.mlp.gate.weight", "model.layers..mlp.gate.weight", "model.layers.999999.mlp.gate.weight",
                           "model.layers.1x.mlp.gate.weight", "model.layers.99999999999999999999.mlp.gate.weight", "blk.0.attn_q.weight",
                           "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.mlp.experts.gate_up_proj"})
    EXPECT_EQ(our_name(Format::hf, name), std::nullopt) << name;
  EXPECT_EQ(our_name(Format::gguf, "blk.0.attn_rot_embd.weight"), std::nullopt);
  EXPECT_EQ(stored_name(Format::gguf, "layers.0.attn.qq"), std::nullopt);
}

TEST(Names, fused_experts_say_their_parts) {
  EXPECT_EQ(fused_experts(Format::hf, "model.layers.4.mlp.experts.gate_up_proj"),
            (std::vector<std::string>{"layers.4.ffn.experts.gate", "layers.4.ffn.experts.up"}));
  EXPECT_EQ(fused_experts(Format::hf, "model.layers.4.mlp.experts.down_proj"), (std::vector<std::string>{"layers.4.ffn.experts.down"}));
  EXPECT_TRUE(fused_experts(Format::hf, "model.layers.4.mlp.experts.down_proj.weight").empty());
  EXPECT_TRUE(fused_experts(Format::gguf, "model.layers.4.mlp.experts.down_proj").empty());
}

}  // namespace
}  // namespace mla::test
