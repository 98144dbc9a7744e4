#!/usr/bin/env python3
"""Writes the small well-formed model files that the fuzzers of model formats start from, into tests/fuzz/corpus. Needs nothing but Python."""

import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fuzz" / "corpus"
BLOCK_BYTES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 13: (256, 176), 14: (256, 210), 24: (1, 1), 30: (1, 2)}
NUMBERS = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"),
           "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}


def save(corpus: str, name: str, data: bytes) -> None:
    folder = CORPUS / corpus
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def safetensors(tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None) -> bytes:
    header: dict = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(i % 251 for i in range(at))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(kind: str, x) -> bytes:
    return string(x) if kind == "string" else struct.pack("<" + NUMBERS[kind][1], x)


def number(kind: str) -> int:
    return 8 if kind == "string" else NUMBERS[kind][0]


def pair(key: str, kind: str, x) -> bytes:
    if isinstance(x, list):
        return string(key) + struct.pack("<IIQ", 9, number(kind), len(x)) + b"".join(value(kind, e) for e in x)
    return string(key) + struct.pack("<I", number(kind)) + value(kind, x)


def gguf(pairs: list[tuple], tensors: list[tuple[str, list[int], int]], version: int = 3, alignment: int = 32) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pair(*p) for p in pairs)
    data = b""
    for name, dims, kind in tensors:  # dims innermost first
        data += b"\0" * (-len(data) % alignment)
        count = 1
        for n in dims:
            count *= n
        block, size = BLOCK_BYTES[kind]
        out += string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, len(data))
        data += bytes(i % 251 for i in range(count // block * size))
    return out + b"\0" * (-len(out) % alignment) + data


def main() -> None:
    save("safetensors", "empty", safetensors({}))
    save("safetensors", "types", safetensors({"a": ("F32", [2, 3], 24), "b": ("BF16", [4], 8), "c": ("F16", [1, 1, 2], 4), "d": ("I64", [], 8),
                                              "e": ("BOOL", [3], 3), "none": ("F32", [0, 2], 0)}, {"format": "pt"}))
    save("safetensors", "names", safetensors({"model.embed_tokens.weight": ("F32", [2, 2], 16), "model.layers.0.mlp.experts.gate_up_proj": ("F16", [2, 2, 2], 16),
                                              "model.layers.0.self_attn.kv_a_proj_with_mqa.bias": ("BF16", [3], 6)}))

    save("gguf", "empty", gguf([], []))
    save("gguf", "scalars", gguf([("k." + kind, kind, True if kind == "bool" else 1) for kind in NUMBERS] + [("k.string", "string", "text")], [], 2))
    save("gguf", "arrays", gguf([("a." + kind, kind, [True, False] if kind == "bool" else [1, 2, 3]) for kind in NUMBERS]
                                + [("a.string", "string", ["a", "", "\u0120b"])], []))
    save("gguf", "vocabulary", gguf([("general.architecture", "string", "llama"), ("tokenizer.ggml.model", "string", "gpt2"),
                                     ("tokenizer.ggml.tokens", "string", ["a", "b", "ab"]), ("tokenizer.ggml.merges", "string", ["a b"]),
                                     ("tokenizer.ggml.token_type", "i32", [1, 1, 1]), ("tokenizer.ggml.scores", "f32", [0.0, -1.0, -2.0])], []))
    save("gguf", "types", gguf([], [(f"t{kind}", [block, 2] if block > 1 else [3], kind) for kind, (block, _) in BLOCK_BYTES.items()]))
    save("gguf", "aligned", gguf([("general.alignment", "u32", 64)], [("token_embd.weight", [2, 3, 4], 0), ("blk.0.attn_norm.weight", [2], 0)], 3, 64))


if __name__ == "__main__":
    main()
