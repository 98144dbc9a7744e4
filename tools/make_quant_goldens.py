#!/usr/bin/env python3
"""Writes tests/data/quant/*.bin with the `gguf` package: random blocks of each type followed by the 256 f32 they stand for, and for the
types that package can encode, 256 f32 followed by its encoding."""

import pathlib

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "quant"
# type: (elements of a block, its bytes, where its f16 factors are)
TYPES = {Type.Q8_0: (32, 34, [0]), Type.Q4_0: (32, 18, [0]), Type.Q4_1: (32, 20, [0, 2]), Type.Q4_K: (256, 144, [0, 2]),
         Type.Q5_K: (256, 176, [0, 2]), Type.Q6_K: (256, 210, [208])}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for kind, (block, size, factors) in TYPES.items():
        blocks = random.integers(0, 256, size=(256 // block, size), dtype=np.uint8)
        for at in factors:
            blocks[:, at:at + 2] = (random.normal(size=len(blocks)) * 0.02).astype("<f2").view(np.uint8).reshape(-1, 2)
        values = quants.dequantize(blocks, kind).astype("<f4")
        (FOLDER / f"{kind.name.lower()}_decode.bin").write_bytes(blocks.tobytes() + values.tobytes())
    for kind in (Type.Q8_0, Type.Q4_0, Type.Q4_1):
        values = random.normal(size=256).astype("<f4")
        (FOLDER / f"{kind.name.lower()}_encode.bin").write_bytes(values.tobytes() + quants.quantize(values, kind).tobytes())


if __name__ == "__main__":
    main()
