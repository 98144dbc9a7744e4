"""Writes the golden DeepSeek-V2 model `dsv2-q-group` as GGUF with the gguf package, in the two forms that llama.cpp has used:
deepseek2-fused.gguf (one attn_kv_b a layer) and deepseek2-split.gguf (attn_k_b transposed, attn_v_b).

    python make_gguf.py [-o FOLDER]
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

from make import ROOT
from reference import read_folder, rope_settings

PLAIN = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip


def metadata(writer, c, split):
    rope = rope_settings(c)
    d_r, d_c = c["qk_rope_head_dim"], c["kv_lora_rank"]
    query, value = c["qk_nope_head_dim"] + d_r, c["v_head_dim"]
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1 if split else c["num_attention_heads"])
    writer.add_key_length(d_c + d_r if split else query)
    writer.add_value_length(d_c if split else value)
    if split:
        writer.add_key_length_mla(query)
        writer.add_value_length_mla(value)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(d_r)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_kv_lora_rank(d_c)
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_weights_norm(c["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])


def write(path, c, weights, split):
    writer = gguf.GGUFWriter(path, "deepseek2")
    metadata(writer, c, split)
    add = lambda name, value: writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    heads, d_h = c["num_attention_heads"], c["qk_nope_head_dim"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for ours, theirs in PLAIN.items():
            if prefix + ours + ".weight" in weights:
                add(f"blk.{layer}.{theirs}.weight", weights[prefix + ours + ".weight"])
        kv_b = weights[prefix + "self_attn.kv_b_proj.weight"]
        if split:
            by_head = kv_b.reshape(heads, -1, kv_b.shape[-1])  # [n_h, d_h + d_v, d_c]
            add(f"blk.{layer}.attn_k_b.weight", by_head[:, :d_h].transpose(0, 2, 1))
            add(f"blk.{layer}.attn_v_b.weight", by_head[:, d_h:])
        else:
            add(f"blk.{layer}.attn_kv_b.weight", kv_b)
        if prefix + "mlp.gate.weight" in weights:
            for part in ("gate", "up", "down"):
                experts = [weights[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] for e in range(c["n_routed_experts"])]
                add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT)
    folder = parser.parse_args().output
    config, weights = read_folder(folder / "dsv2-q-group")
    write(folder / "deepseek2-fused.gguf", config, weights, False)
    write(folder / "deepseek2-split.gguf", config, weights, True)


if __name__ == "__main__":
    main()
