#!/usr/bin/env python3
"""Times cuDNN's attention through PyTorch by the protocol of bench_cuda_attention: one causal sequence, bf16, keys of 192 and values of 128
columns, the second-level cache flushed before each of 30 runs, whose median counts."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import time_us

print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
print("heads cache  d_k  d_v  tokens |       µs TFLOP/s")
for heads, cache, d_k, d_v, tokens in [(16, 16, 192, 128, 512), (16, 16, 192, 128, 2048), (16, 16, 192, 128, 4096), (16, 16, 192, 128, 8192),
                                       (128, 128, 192, 128, 2048), (128, 128, 192, 128, 8192), (32, 32, 128, 128, 8192),
                                       (32, 8, 128, 128, 4096), (32, 8, 64, 64, 4096)]:
    q, k, v = (torch.randn(1, tokens, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) / 10
               for h, d in ((heads, d_k), (cache, d_k), (cache, d_v)))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        us = time_us(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != cache))
    flop = tokens * tokens * heads * (d_k + d_v)
    print(f"{heads:5} {cache:5} {d_k:4} {d_v:4} {tokens:7} | {us:8.1f} {1e-6 * flop / us:7.0f}", flush=True)
