#!/usr/bin/env python3
"""Writes the tokenizer.json of Qwen2 from its tiktoken file: the merges follow from the ranks.

usage: tools/tiktoken_to_json.py qwen.tiktoken tokenizer.json
"""
import base64
import json
import sys

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def alphabet():
    """GPT-2's spelling of bytes as printable characters."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    return {**{b: chr(b) for b in prints}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def halves(token, ranks):
    """The two parts of the last merge on the way to this token."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def main():
    source, target = sys.argv[1:]
    with open(source, "rb") as file:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file if line.strip())}
    letters = alphabet()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = [[spell(part) for part in halves(token, ranks)] for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    added = [
        {"id": len(ranks) + i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, content in enumerate(CONTROL)
    ]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    with open(target, "w", encoding="utf-8") as file:
        json.dump(
            {
                "version": "1.0",
                "added_tokens": added,
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "post_processor": byte_level,
                "decoder": byte_level,
                "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges},
            },
            file,
            ensure_ascii=False,
        )


main()
