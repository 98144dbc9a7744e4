"""Makes tests/data/golden: small random checkpoints with the logits and greedy continuations they must give.

Every folder holds a checkpoint as Hugging Face writes it, and beside it
    golden-ids.npy      i4 [n]            a sequence of token ids
    golden-rows.npy     i4 [rows]         the positions whose logits are kept
    golden-logits.npy   f4 [rows, vocab]  of the float64 model in reference.py
    golden-greedy.npy   i4 [64]           what follows the first 32 ids when the most likely token is taken each time
Weights are large enough that attention, routing and logits are far from uniform. A seed is taken only if no choice of an expert or a
token is so close that rounding could turn it. Hugging Face transformers in f32 is run beside it and must agree, or the difference
must be a known one (HF_DIFFERS).

    python make.py [NAME …] [-o FOLDER]
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from reference import Model, greedy

ROOT = Path(__file__).resolve().parents[2] / "tests/data/golden"
PROMPT, CONTINUATION = 32, 64

# What Hugging Face does otherwise, where we follow DeepSeek's own code.
HF_DIFFERS = {"dsv2-renorm": "it ignores norm_topk_prob and always multiplies by routed_scaling_factor"}

YARN = dict(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)


def deepseek(**changes):
    config = dict(
        model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], vocab_size=199, hidden_size=48, intermediate_size=70,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=163840, attention_bias=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        kv_lora_rank=28, q_lora_rank=None, qk_nope_head_dim=20, qk_rope_head_dim=12, v_head_dim=18,
        n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=18, first_k_dense_replace=1,
        moe_layer_freq=1, topk_method="greedy", n_group=1, topk_group=1, scoring_func="softmax", norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )  # fmt: skip
    return config | changes


def llama(**changes):
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=211, hidden_size=56, intermediate_size=90,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=14, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=8192, attention_bias=False, mlp_bias=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return config | changes


def classic(theta=10000.0, dtype="float32", scaling=None):
    return dict(rope_theta=theta, rope_scaling=scaling, torch_dtype=dtype)


def modern(theta=10000.0, dtype="float32", **rope):
    return dict(rope_parameters=dict(rope_theta=theta, rope_type="default") | rope, dtype=dtype)


def yarn(mscale, mscale_all_dim):
    return YARN | dict(mscale=mscale, mscale_all_dim=mscale_all_dim)


GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
LONG = 4224
# name: (config, length of the golden sequence, shards)
MODELS = {
    # V2-Lite's shape in small, and as it is published: pairs of mscale 0.707, `type`, classic style.
    "dsv2-noq-greedy": (deepseek(**classic(scaling=dict(type="yarn") | yarn(0.707, 0.707))), LONG, 1),
    "dsv2-noq-greedy-bf16": (deepseek(**classic(dtype="bfloat16", scaling=dict(type="yarn") | yarn(0.707, 0.707))), 300, 1),
    # V2's shape in small, as transformers 5 writes it, in two shards.
    "dsv2-q-group": (
        deepseek(q_lora_rank=36, **GROUPS, routed_scaling_factor=2.5, **modern(rope_type="yarn", **yarn(0.707, 0.707))), LONG, 2),
    "dsv2-q-greedy": (deepseek(q_lora_rank=36, first_k_dense_replace=0, n_shared_experts=1, num_hidden_layers=2, **modern(500000.0)), 300, 1),
    "dsv2-noq-group": (
        deepseek(**GROUPS, num_attention_heads=3, num_key_value_heads=3, first_k_dense_replace=2, routed_scaling_factor=16.0,
                 **classic(scaling=dict(rope_type="yarn") | yarn(0.707, 0.707))), LONG, 1),
    "dsv2-mscale": (deepseek(num_hidden_layers=2, **classic(scaling=dict(type="yarn") | yarn(1.0, 0.5))), LONG, 1),
    "dsv2-bias": (deepseek(q_lora_rank=36, attention_bias=True, num_hidden_layers=2, **classic()), 300, 1),
    "dsv2-renorm": (deepseek(norm_topk_prob=True, routed_scaling_factor=2.5, num_hidden_layers=2, **classic()), 300, 1),
    "llama3": (
        llama(**modern(500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=256)), 700, 1),
    "llama2-mha": (
        llama(hidden_size=54, num_attention_heads=3, num_key_value_heads=3, head_dim=18,
              **classic(scaling=dict(type="linear", factor=2.0))), 300, 1),
    "mqa-bias": (llama(hidden_size=60, num_attention_heads=5, num_key_value_heads=1, head_dim=10, attention_bias=True, **classic()), 300, 1),
    "qwen2": (
        llama(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=60, num_attention_heads=6, head_dim=10,
              rms_norm_eps=1e-6, tie_word_embeddings=True, use_sliding_window=False, **classic(1000000.0)), 300, 1),
    "mistral": (
        llama(model_type="mistral", architectures=["MistralForCausalLM"], num_key_value_heads=1, sliding_window=37, **modern()), 300, 1),
}  # fmt: skip


def shapes(c):
    """Name and shape of every weight, as Hugging Face names them."""
    d, v = c["hidden_size"], c["vocab_size"]
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    qwen, bias = c["model_type"] == "qwen2", c["attention_bias"]
    out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, d)

    def linear(name, rows, cols, has_bias=False):
        out[name + ".weight"] = (rows, cols)
        if has_bias:
            out[name + ".bias"] = (rows,)

    def ffn(name, width):
        linear(name + "gate_proj", width, d), linear(name + "up_proj", width, d), linear(name + "down_proj", d, width)

    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (d,)
        if c["model_type"] != "deepseek_v2":
            h = c["head_dim"]
            linear(a + "q_proj", heads * h, d, qwen or bias), linear(a + "o_proj", d, heads * h, bias)
            linear(a + "k_proj", groups * h, d, qwen or bias), linear(a + "v_proj", groups * h, d, qwen or bias)
            ffn(p + "mlp.", c["intermediate_size"])
            continue
        d_q, d_c, lora = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["kv_lora_rank"], c["q_lora_rank"]
        if lora:
            linear(a + "q_a_proj", lora, d, bias), linear(a + "q_b_proj", heads * d_q, lora)
            out[a + "q_a_layernorm.weight"] = (lora,)
        else:
            linear(a + "q_proj", heads * d_q, d)
        linear(a + "kv_a_proj_with_mqa", d_c + c["qk_rope_head_dim"], d, bias)
        out[a + "kv_a_layernorm.weight"] = (d_c,)
        linear(a + "kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), d_c)
        linear(a + "o_proj", d, heads * c["v_head_dim"], bias)
        if layer < c["first_k_dense_replace"]:
            ffn(p + "mlp.", c["intermediate_size"])
            continue
        linear(p + "mlp.gate", c["n_routed_experts"], d)
        ffn(p + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
        for expert in range(c["n_routed_experts"]):
            ffn(f"{p}mlp.experts.{expert}.", c["moe_intermediate_size"])
    return out


def random_weights(config, seed):
    """Normal weights with the gain that keeps activations near 1, and norms, biases and gates that matter."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes(config).items()):
        if "norm" in name:
            value = random.normal(1, 0.2, shape)
        elif name.endswith(".bias"):
            value = random.normal(0, 0.3, shape)
        else:
            gain = 1.4 if any(part in name for part in ("q_proj", "q_b_proj", "k_proj", "kv_b_proj", "mlp.gate.")) else 1.0
            value = random.normal(0, gain / shape[-1] ** 0.5, shape)
        if config.get("kv_lora_rank") and config["first_k_dense_replace"] == 0 and name.endswith(("kv_a_proj_with_mqa.weight", "q_a_proj.weight")):
            value[: config["kv_lora_rank"]] *= 2e-3  # latents so small that the norm's epsilon shows
        weights[name] = torch.from_numpy(value.astype(np.float32))
    weights["model.embed_tokens.weight"] *= embedding_scale(config)
    if (config.get("torch_dtype") or config.get("dtype")) == "bfloat16":
        weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    return weights


def embedding_scale(config):
    """Untied embeddings start the residual stream near 1 per element; tied ones are the output head too and stay small."""
    return 1.0 if config["tie_word_embeddings"] else config["hidden_size"] ** 0.5


def write_checkpoint(folder, config, weights, shards):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= {name: file for name in part}
    size = sum(value.nbytes for value in weights.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def kept_rows(length):
    edges = [20, 35, 36, 37, 38, 62, 63, 64, 65, 127, 128, 129, 255, 256, 299, 512, 699, 1023, 2048, 4095, 4096, 4097, 4098, 4150]
    return np.array([row for row in [*range(16), *edges] if row < length - 1] + [length - 1], np.int32)


def hf_logits(folder, ids, rows):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long()).logits[0, rows].numpy()


def make(name, root):
    config, length, shards = MODELS[name]
    folder = root / name
    for seed in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, config, random_weights(config, seed), shards)
        ids = np.random.default_rng(1000 + seed).integers(2, config["vocab_size"], length).astype(np.int32)
        model = Model(folder)
        continuation, lead = greedy(model, ids[:PROMPT], CONTINUATION)
        if lead < 5e-4 or len(set(continuation)) < 8:
            continue
        rows = kept_rows(length)
        golden = model(ids, rows)
        if model.routing_margin > 2e-6:
            break
    spread = np.ptp(golden)
    hf = np.abs(hf_logits(folder, ids, rows) - golden).max() / spread
    known = HF_DIFFERS.get(name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:22} seed {seed:2}  {size / 1000:4.0f} kB  spread {spread:5.1f}  routing margin {model.routing_margin:.1e}  "
          f"greedy lead {lead:.1e}  HF f32 off by {hf:.1e} of the spread{' (' + known + ')' if known else ''}", flush=True)  # fmt: skip
    assert (hf > 1e-2) if known else (hf < 1e-3), f"{name}: transformers and the reference disagree"
    np.save(folder / "golden-ids.npy", ids)
    np.save(folder / "golden-rows.npy", rows)
    np.save(folder / "golden-logits.npy", golden.astype(np.float32))
    np.save(folder / "golden-greedy.npy", np.array(continuation, np.int32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("-o", "--output", type=Path, default=ROOT)
    args = parser.parse_args()
    for name in args.names:
        make(name, args.output)


if __name__ == "__main__":
    main()
