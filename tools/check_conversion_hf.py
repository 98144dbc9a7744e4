"""Proves that a folder written by `mla convert` is a DeepSeek-V2 checkpoint: Hugging Face transformers' logits against those of mla.

    pip install torch transformers
    build/release/mla convert model.gguf -o folder --cut 50% --calibrate text.txt
    python tools/check_conversion_hf.py folder

Both run in f32 on the checkpoint's weights. The largest difference must stay below 1e-3 of the logits' spread.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, default=ROOT / "tests/data/text-b.txt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--mla", type=Path, default=ROOT / "build/release/mla")
    args = parser.parse_args()

    config = AutoConfig.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = args.file.read_text()
    ids = tokenizer(text[: 20 * args.tokens], add_special_tokens=False)["input_ids"][: args.tokens]
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].double().numpy()
    print(f"{type(model).__name__}, kv_lora_rank {config.kv_lora_rank}, qk_rope_head_dim {config.qk_rope_head_dim}, {len(ids)} tokens")

    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/ids.npy", np.array(ids, dtype=np.int32))
        for form in ("absorbed", "expanded"):
            command = [args.mla, "logits", args.folder, "--ids", f"{scratch}/ids.npy", "-o", f"{scratch}/logits.npy"]
            subprocess.run([*command, "--attention", form, "--kv-type", "f32"], check=True, stderr=subprocess.DEVNULL)
            ours = np.load(f"{scratch}/logits.npy").astype(np.float64)
            off = np.abs(ours - theirs).max() / theirs.std()
            print(f"{form}: largest difference {off:.2e} of the logits' spread, the same next token at {(ours.argmax(1) == theirs.argmax(1)).mean():.1%}")
            worst = max(worst, off)
        command = [args.mla, "tokenize", args.folder, "--file", args.file, "-o", f"{scratch}/text.npy"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        same = np.load(f"{scratch}/text.npy")[: args.tokens].tolist() == ids
        print(f"tokenizer: {'the same' if same else 'different'} ids")
    prompt = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)
    print("transformers writes:", tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
    sys.exit(0 if worst < 1e-3 and same else 1)


if __name__ == "__main__":
    main()
