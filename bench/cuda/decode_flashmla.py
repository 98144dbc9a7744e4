#!/usr/bin/env python3
"""Times FlashMLA's dense decode by the protocol of bench_cuda_decode: bf16, pages of 64 in shuffled order, data N(0, 1) / 10 clamped to ±1,
the second-level cache flushed before each of 30 runs, whose median counts; plans are made before.

usage: decode_flashmla.py LIBRARY

LIBRARY is FlashMLA as vLLM builds it for the PyTorch that is installed, for 2.11:
    pip download --no-deps vllm==0.20.2 && unzip vllm-0.20.2-*.whl vllm/_flashmla_C.abi3.so"""

import sys

import torch

from timing import time_us

if len(sys.argv) != 2:
    sys.exit(__doc__)
torch.ops.load_library(sys.argv[1])
decode = torch.ops._flashmla_C.dense_decode_fwd

page, d_k, d_v, scale = 64, 576, 512, 192**-0.5
contexts = 1024, 4096, 8192, 16384, 32768
shapes = [(heads, batch, 1, context) for heads in (128, 16) for batch in (1, 4, 16, 64, 128) for context in contexts
          if batch * context <= 64 * 32768]
shapes += [(128, 128, 2, 4096), (128, 132, 1, 8192)]


def draw(*shape):
    return (torch.randn(shape, device="cuda") / 10).clamp(-1, 1).bfloat16()


pages = max(batch * context for _, batch, _, context in shapes) // page
cache = torch.cat([draw(min(2048, pages - i), page, 1, d_k) for i in range(0, pages, 2048)])
order = torch.randperm(pages, device="cuda").int()
print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
print("heads batch  q context |      µs | error of the last sequence")
for heads, batch, queries, context in shapes:
    q = draw(batch, queries, heads, d_k)
    table = order[:batch * context // page].view(batch, -1).contiguous()
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    out, _, plan, splits = decode(q, cache, d_v, lengths, table, scale, True, None, None, None)
    us = time_us(lambda: decode(q, cache, d_v, lengths, table, scale, True, plan, splits, None))
    rows = cache[table[-1].long()].view(-1, d_k).float()
    scores = (q[-1].float() @ rows.T) * scale
    for i in range(queries):
        scores[i, :, context - queries + i + 1:] = -torch.inf
    expected = scores.softmax(-1) @ rows[:, :d_v]
    error = ((out[-1].float() - expected).norm() / expected.norm()).item()
    print(f"{heads:5} {batch:5} {queries:3} {context:7} | {us:7.1f} | {error:.1e}", flush=True)
