"""Perplexity of a GGUF model by Hugging Face transformers in f32: what `mla eval` must agree with to 0.1%.

Windows of `context` tokens without overlap; the first token of each window is given, the others are scored.

    python perplexity_hf.py ~/.cache/mla/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parents[2] / "tests/data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--file", type=Path, default=DATA / "text-a.txt")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=DATA / "perplexity-smollm2.json")
    args = parser.parse_args()
    source = dict(pretrained_model_name_or_path=args.gguf.parent, gguf_file=args.gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    ids = tokenizer(args.file.read_text(), add_special_tokens=False)["input_ids"]
    total, by_window = 0.0, []
    for window in range(args.windows):
        part = torch.tensor(ids[window * args.context : (window + 1) * args.context])[None]
        with torch.no_grad():
            logits = model(part).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
        total += nll
        by_window.append(round(math.exp(nll / (args.context - 1)), 4))
        print(f"window {window}: {by_window[-1]}", flush=True)
    scored = args.windows * (args.context - 1)
    result = {
        "model": args.gguf.name,
        "model_sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
        "file": args.file.name,
        "context": args.context,
        "windows": args.windows,
        "tokens": len(ids),
        "first_ids": ids[:16],
        "tokens_scored": scored,
        "nll": round(total / scored, 6),
        "perplexity": round(math.exp(total / scored), 4),
        "perplexity_by_window": by_window,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(args.output.read_text())


if __name__ == "__main__":
    main()
