"""A language model in float64 NumPy, written from the papers' equations: what every golden value comes from.

DeepSeek-V2 (arXiv 2405.04434, equation numbers below) and LLaMA-like models (llama, mistral, qwen2), read from a Hugging Face
folder. Slow, short and plain: no cache, no batch; attention is always the expanded form of eq. 16-19.

    python reference.py FOLDER --ids IDS.npy [--rows ROWS.npy] -o LOGITS.npy [--dump INTERMEDIATES.npz]
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------- files


def read_safetensors(path):
    """All tensors of one file, as float64."""
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body = memoryview(data)[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        raw = body[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F64": np.float64, "F32": np.float32, "F16": np.float16}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


def read_folder(folder):
    """(config, weights) of a Hugging Face folder, in one file or in shards."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    weights = {}
    for name in sorted(files):
        weights |= read_safetensors(folder / name)
    return config, weights


# --------------------------------------------------------------------------------------------------------------- rotary


def rope_settings(config):
    """rope_theta and the scaling of either style of config.json, in one dictionary."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(rope, dim):
    """(angles per position [dim / 2], what cos and sin are multiplied by)."""
    theta = rope["rope_theta"]
    exponent = np.arange(0, dim, 2) / dim
    frequency = theta**-exponent
    if rope["type"] == "default":
        return frequency, 1.0
    if rope["type"] == "linear":
        return frequency / rope["factor"], 1.0
    original = rope["original_max_position_embeddings"]
    if rope["type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)  # rotations within the trained context
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * frequency / rope["factor"] + smooth * frequency, 1.0
    assert rope["type"] == "yarn", rope["type"]
    # YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times in the trained context keep their frequency, those
    # that turn less than beta_slow times are interpolated, with a ramp between whose ends are whole pairs.
    pair = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low = max(math.floor(pair(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(rope.get("beta_slow") or 1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    frequency = frequency * (1 - ramp) + frequency / rope["factor"] * ramp
    if rope.get("attention_factor"):
        return frequency, rope["attention_factor"]
    # DeepSeek's own code: mscale defaults to 1 and mscale_all_dim to 0, for which mscale(s, 0) = 1.
    scale = yarn_mscale(rope["factor"], rope.get("mscale") or 1) / yarn_mscale(rope["factor"], rope.get("mscale_all_dim") or 0)
    return frequency, scale


def rotate(x, rope, interleaved):
    """Rotary embedding of x [T, heads, dim] at positions 0 … T-1; pairs (2i, 2i+1) if interleaved, else (i, i + dim/2)."""
    frequency, scale = rope_frequencies(rope, x.shape[-1])
    angle = np.arange(x.shape[0])[:, None, None] * frequency  # [T, 1, dim/2]
    half = x.shape[-1] // 2
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (real + 1j * imaginary) * np.exp(1j * angle) * scale
    out = np.empty_like(x)
    if interleaved:
        out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    else:
        out[..., :half], out[..., half:] = turned.real, turned.imag
    return out


# ---------------------------------------------------------------------------------------------------------------- parts


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def attention(q, k, v, scale, window):
    """Causal softmax attention: q, k [T, n, d], v [T, n, d_v] → [T, n, d_v]; blocks of queries keep the memory small."""
    tokens, heads, _ = q.shape
    out = np.empty((tokens, heads, v.shape[-1]))
    for head in range(heads):
        for start in range(0, tokens, 512):
            end = min(start + 512, tokens)
            first = max(0, start - window + 1) if window else 0
            scores = q[start:end, head] @ k[first:end, head].T * scale
            query, key = np.arange(start, end)[:, None], np.arange(first, end)[None, :]
            hidden = key > query
            if window:
                hidden |= key <= query - window
            scores[hidden] = -np.inf
            out[start:end, head] = softmax(scores) @ v[first:end, head]
    return out


class Model:
    """logits = Model(folder)(ids); `dump`, if a dictionary, collects intermediates by the program's names."""

    def __init__(self, folder):
        self.config, self.weights = read_folder(folder)
        self.rope = rope_settings(self.config)
        self.dump = None
        self.routing_margin = math.inf  # how near the gate came to another choice, relative to the score

    def note(self, name, value):
        if self.dump is not None:
            self.dump[name] = value

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, x, name, eps):
        return rms_norm(x, self.weights[name + ".weight"], eps)

    def mla(self, x, prefix):
        """Multi-head latent attention, eq. 9-19. x [T, D]."""
        c = self.config
        heads, d_h, d_r, d_v = (c[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        d_c = c["kv_lora_rank"]
        if c.get("q_lora_rank"):
            c_q = self.norm(self.linear(x, prefix + "q_a_proj"), prefix + "q_a_layernorm", 1e-6)  # 12
            q = self.linear(c_q, prefix + "q_b_proj")
        else:
            q = self.linear(x, prefix + "q_proj")
        q = q.reshape(-1, heads, d_h + d_r)  # 13, 14: [q_c | q_R] of each head
        kv = self.linear(x, prefix + "kv_a_proj_with_mqa")  # 9, 15
        c_kv = self.norm(kv[:, :d_c], prefix + "kv_a_layernorm", 1e-6)
        k_r = rotate(kv[:, None, d_c:], self.rope, True)  # 15: one for all heads
        q = np.concatenate([q[..., :d_h], rotate(q[..., d_h:], self.rope, True)], -1)  # 16
        kv_b = self.linear(c_kv, prefix + "kv_b_proj").reshape(-1, heads, d_h + d_v)  # 10, 11
        k = np.concatenate([kv_b[..., :d_h], np.broadcast_to(k_r, (len(x), heads, d_r))], -1)  # 17
        scale = (d_h + d_r) ** -0.5
        if self.rope["type"] == "yarn" and self.rope.get("mscale_all_dim"):
            scale *= yarn_mscale(self.rope["factor"], self.rope["mscale_all_dim"]) ** 2
        self.note(prefix + "latent", c_kv), self.note(prefix + "k_rope", k_r[:, 0]), self.note(prefix + "q", q)
        o = attention(q, k, kv_b[..., d_h:], scale, 0)  # 18
        return self.linear(o.reshape(len(x), -1), prefix + "o_proj")  # 19

    def gqa(self, x, prefix):
        """Grouped-query attention: x [T, D]; MHA and MQA are its ends."""
        c = self.config
        heads, groups = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
        split = lambda name, n: self.linear(x, prefix + name).reshape(len(x), n, -1)
        q, k = rotate(split("q_proj", heads), self.rope, False), rotate(split("k_proj", groups), self.rope, False)
        k, v = (np.repeat(t, heads // groups, axis=1) for t in (k, split("v_proj", groups)))
        window = (c.get("sliding_window") or 0) if c["model_type"] == "mistral" else 0
        o = attention(q, k, v, q.shape[-1] ** -0.5, window)
        return self.linear(o.reshape(len(x), -1), prefix + "o_proj")

    def ffn(self, x, prefix):
        gate, up = self.linear(x, prefix + "gate_proj"), self.linear(x, prefix + "up_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * up, prefix + "down_proj")

    def choose(self, scores):
        """Indices [T, k] of the experts of every token, and the group-limited scores they were chosen by."""
        c, k = self.config, self.config["num_experts_per_tok"]
        if c["topk_method"] == "group_limited_greedy":
            # Device-limited routing (2.2.2): a group counts as much as its best expert.
            groups = scores.reshape(len(scores), c["n_group"], -1)
            best = groups.max(-1)
            order = np.argsort(-best, axis=-1, kind="stable")
            self.margin(np.take_along_axis(best, order, -1), c["topk_group"])
            keep = np.zeros(best.shape, bool)
            np.put_along_axis(keep, order[:, : c["topk_group"]], True, -1)
            scores = np.where(keep[..., None], groups, 0).reshape(scores.shape)
        order = np.argsort(-scores, axis=-1, kind="stable")
        self.margin(np.take_along_axis(scores, order, -1), k)
        return order[:, :k]

    def margin(self, ordered, k):
        if k < ordered.shape[-1]:
            self.routing_margin = min(self.routing_margin, (1 - ordered[:, k] / ordered[:, k - 1]).min())

    def moe(self, x, prefix):
        """DeepSeekMoE, eq. 20-22: x [T, D]."""
        c = self.config
        scores = softmax(self.linear(x, prefix + "gate"))  # over all experts, before the choice
        chosen = self.choose(scores)
        weight = np.take_along_axis(scores, chosen, -1)
        if c.get("norm_topk_prob") and c["num_experts_per_tok"] > 1:
            weight = weight / weight.sum(-1, keepdims=True)
        else:
            weight = weight * c["routed_scaling_factor"]
        self.note(prefix + "expert", chosen), self.note(prefix + "weight", weight)
        out = self.ffn(x, prefix + "shared_experts.") if c.get("n_shared_experts") else np.zeros_like(x)
        for expert in range(scores.shape[-1]):
            token, place = np.nonzero(chosen == expert)
            if len(token):
                out[token] += weight[token, place, None] * self.ffn(x[token], f"{prefix}experts.{expert}.")
        return out

    def is_moe(self, layer):
        c = self.config
        return bool(c.get("n_routed_experts")) and layer >= c.get("first_k_dense_replace", 0) and layer % c.get("moe_layer_freq", 1) == 0

    def __call__(self, ids, rows=None):
        """logits [rows, vocab] of the sequence ids; all rows if none are named."""
        c, eps = self.config, self.config["rms_norm_eps"]
        x = self.weights["model.embed_tokens.weight"][ids]
        attend = self.mla if c["model_type"] == "deepseek_v2" else self.gqa
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + attend(self.norm(x, prefix + "input_layernorm", eps), prefix + "self_attn.")
            self.note(f"layers.{layer}.attn.out", x)
            feed_forward = self.moe if self.is_moe(layer) else self.ffn
            x = x + feed_forward(self.norm(x, prefix + "post_attention_layernorm", eps), prefix + "mlp.")
            self.note(f"layers.{layer}.out", x)
        x = self.norm(x if rows is None else x[rows], "model.norm", eps)
        head = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
        return x @ self.weights[head].T


def greedy(model, prompt, count):
    """(count new ids, the smallest lead of a choice over the next best, relative to the logits' spread)."""
    ids, lead = list(prompt), math.inf
    for _ in range(count):
        logits = model(np.array(ids), [-1])[0]
        second, first = np.sort(logits)[-2:]
        lead = min(lead, (first - second) / np.ptp(logits))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], lead


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--rows")
    parser.add_argument("--dump", help="write every named intermediate to this .npz")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    model = Model(args.folder)
    model.dump = {} if args.dump else None
    rows = np.load(args.rows) if args.rows else None
    np.save(args.output, model(np.load(args.ids), rows).astype(np.float32))
    if args.dump:
        np.savez(args.dump, **model.dump)


if __name__ == "__main__":
    main()
