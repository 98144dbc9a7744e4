#!/usr/bin/env python3
"""Writes tests/data/golden/written.gguf with the gguf package: the bytes that GgufWriter must produce.

usage: make_written_gguf.py OUT.gguf
"""
import sys

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType
tensors = [
    ("token_embd.weight", (5, 32), Type.F16, 320),
    ("output_norm.weight", (3,), Type.F32, 12),
    ("blk.0.ffn_down_exps.weight", (2, 3, 64), Type.Q4_0, 216),
]

writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_uint32("llama.block_count", 1)
writer.add_float32("llama.rope.freq_base", 10000.0)
writer.add_bool("tokenizer.ggml.add_bos_token", True)
array = gguf.GGUFValueType.ARRAY
writer.add_key_value("tokenizer.ggml.merges", ["x"], array)
writer.add_key_value("tokenizer.ggml.scores", [0.5, -1.0], array)
writer.add_key_value("tokenizer.ggml.token_type", [1, 3], array)
writer.add_key_value("tokenizer.ggml.tokens", ["a", "ü"], array)
writer.add_uint64("z.big", 1 << 40)
writer.add_int32("z.negative", -5)
writer.add_uint32("general.alignment", 32)

i = np.arange(sum(size for *_, size in tensors), dtype=np.uint64)
data = (i * 7 + i // 256).astype(np.uint8)
at = 0
for name, shape, kind, size in tensors:
    part = data[at : at + size]
    at += size
    if kind == Type.F16:
        writer.add_tensor(name, part.view(np.float16).reshape(shape))
    elif kind == Type.F32:
        writer.add_tensor(name, part.view(np.float32).reshape(shape))
    else:
        writer.add_tensor(name, part.reshape(*shape[:-1], -1), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
