// Tensor names: one table of what we, Hugging Face and GGUF call each tensor, read in both directions.
#pragma once

#include "io/checkpoint.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

constexpr std::string_view scales_suffix = ".scales";
bool names_scales(Format format, std::string_view stored);

// What we call the tensor that a file calls `stored`: "model.layers.3.self_attn.kv_a_proj_with_mqa.bias" and
// "blk.3.attn_kv_a_mqa.bias" are "layers.3.attn.kv_a.bias"; weights have no suffix, and the scales of fp8
// weights ("….weight_scale_inv") have ".scales". Nothing for names outside the table.
// Experts are one tensor each in HF ("layers.3.ffn.experts.gate.17") and one stack a layer in GGUF ("layers.3.ffn.experts.gate").
std::optional<std::string> our_name(Format format, std::string_view stored);

// What the format calls our tensor. Nothing where it has no such tensor, as HF for the split "layers.3.attn.k_b".
std::optional<std::string> stored_name(Format format, std::string_view ours);

// What a tensor that holds all experts of a layer, as transformers keeps them in memory, is made of: for "….experts.gate_up_proj", [E, gate
// over up, hidden], {"layers.N.ffn.experts.gate", "layers.N.ffn.experts.up"}; the same for its scales. Empty for every other name.
std::vector<std::string> fused_experts(Format format, std::string_view stored);

}  // namespace mla
