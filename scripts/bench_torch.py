#!/usr/bin/env python3
"""PyTorch at the shapes of bench_gpu.c: what it is compared with.  Needs torch and a GPU.

    bench_torch.py [decode] [prefill] [products]      all without any

The better of the cuDNN and FlashAttention back ends of scaled_dot_product_attention, in a
CUDA graph over several pools by turns; products with torch.nn.functional.linear.
"""
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 49152, 98304, 131072)
CHUNKS = ((2048, 2048), (8192, 8192), (8192, 2048), (16384, 2048), (32768, 2048), (65536, 2048),
          (98304, 2048), (98304, 1024), (98304, 512))


def microseconds(queue, calls):
    """The median time of a call in a replayed graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            queue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 5 / calls)
    return sorted(times)[len(times) // 2]


def attention(batch, tokens, rows, layers):
    """Best of the back ends, and its name; GQA, causal from the end when rows > 1."""
    q = torch.randn(batch, HEADS, rows, DIM, device="cuda", dtype=torch.bfloat16)
    pools = [torch.randn(2, batch, KV_HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)
             for _ in range(layers)]
    best = (float("inf"), "none")
    bias = None
    if 1 < rows < tokens:
        from torch.nn.attention.bias import causal_lower_right
        bias = causal_lower_right(rows, tokens)
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION),
                          ("FlashAttention", SDPBackend.FLASH_ATTENTION)):
        def queue():
            with sdpa_kernel(backend):
                for k, v in pools:
                    torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, attn_mask=bias, is_causal=rows == tokens, enable_gqa=True)
        try:
            best = min(best, (microseconds(queue, layers), name))
        except RuntimeError as error:
            print(f"    {name}: {str(error).splitlines()[0][:90]}", file=sys.stderr)
    return best


def measure_decode():
    print("full attention, one row a sequence\n  tokens  batch        us     GB/s")
    for batch in (1, 4, 8):
        for tokens in LENGTHS:
            layers = 8 if tokens < 50000 or batch < 8 else 4
            us, name = attention(batch, tokens, 1, layers)
            size = batch * tokens * KV_HEADS * DIM * 4
            print(f"{tokens:8} {batch:6} {us:9.1f} {size / us * 1e-3:8.0f}  {name}", flush=True)


def measure_prefill():
    print("full attention of a chunk of rows\n  tokens   rows        us  TFLOP/s")
    for tokens, rows in CHUNKS:
        us, name = attention(1, tokens, rows, 2)
        flop = 4 * rows * (tokens - rows / 2) * HEADS * DIM
        print(f"{tokens:8} {rows:6} {us:9.1f} {flop / us * 1e-6:8.1f}  {name}", flush=True)


def measure_products():
    print("products  rows        us     GB/s  TFLOP/s")
    for name, inner, outer in (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate/up", 4096, 24576),
                               ("down", 12288, 4096)):
        copies = int(400e6 / (2 * inner * outer)) + 1
        weights = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
                   for _ in range(copies)]
        for rows in (1, 8, 32, 2048):
            x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
            us = microseconds(lambda: [torch.nn.functional.linear(x, w) for w in weights], copies)
            size = 2 * inner * outer
            print(f"{name:8} {rows:5} {us:9.1f} {size / us * 1e-3:8.0f} {size * rows / us * 1e-6:8.1f}",
                  flush=True)


def main():
    sections = sys.argv[1:] or ["decode", "prefill", "products"]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if "decode" in sections:
        measure_decode()
    if "prefill" in sections:
        measure_prefill()
    if "products" in sections:
        measure_products()


if __name__ == "__main__":
    main()
