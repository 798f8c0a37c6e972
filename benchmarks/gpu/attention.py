"""Attention over the paged KV on a CUDA GPU: decode steps in CUDA graphs, prompts, and the host's work for each.

KV is block-major, blocks are scattered and belong to one sequence each, and the layers of a step follow each other
as in a model; none is in the GPU's cache when a step begins. Decode bandwidth counts the KV that must be read;
prompt speed counts the multiplications that a causal mask leaves.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch

from engine.attention.base import AttentionLayer, Span
from engine.attention.flashinfer import FlashInferAttention, Group
from engine.layers.rotary import Rotation

BLOCK_SIZE = 16
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
DECODES = [[(num_rows, 256)] for num_rows in (1, 8, 32, 64, 128, 256, 512)]
DECODES += [[(64, 4096)], [(1, 131072)], [(8, 131072)], [(63, 256), (1, 32768)]]
PROMPTS = [(8, 0, 2048), (1, 0, 2048), (1, 0, 16384), (64, 0, 2048), (1, 14336, 2048), (4, 4096, 64)]


class Bench:
    """One pool for all shapes; `num_layers` are attended to in a step."""

    def __init__(self, args: argparse.Namespace, kv_dtype: torch.dtype) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = args.heads, args.kv_heads, args.head_dim
        layer_bytes = 2 * args.kv_heads * BLOCK_SIZE * args.head_dim * kv_dtype.itemsize
        num_blocks = int(args.pool_gb * 1e9) // (layer_bytes * args.layers)
        kv = torch.randint(0, 100, (num_blocks * layer_bytes * args.layers,), dtype=torch.uint8, device="cuda")
        if kv_dtype != torch.float8_e4m3fn:
            kv = kv.view(torch.int16).bitwise_and_(0x3FFF)  # small finite numbers
        self.kv = kv.view(kv_dtype).view(num_blocks, args.layers, 2, args.kv_heads, BLOCK_SIZE, args.head_dim)
        self.layers = [AttentionLayer(i, args.head_dim**-0.5, None, None) for i in range(args.layers)]
        self.attention = FlashInferAttention(
            self.kv, args.heads, torch.bfloat16, max_graph_rows=512, max_model_len=1 << 17
        )

    def spans(self, sizes: Sequence[tuple[int, int]]) -> list[Span]:
        """Of (start, num_tokens). Raises ValueError when the pool is too small for all together."""
        num_blocks = [-(-(start + num_tokens) // BLOCK_SIZE) for start, num_tokens in sizes]
        if sum(num_blocks) >= len(self.kv):
            raise ValueError(f"{sum(num_blocks)} blocks do not fit into a pool of {len(self.kv)}: raise --pool-gb")
        block_ids = iter((1 + np.random.default_rng(0).permutation(len(self.kv) - 1)).tolist())
        spans = []
        for (start, num_tokens), count in zip(sizes, num_blocks, strict=True):
            spans.append(Span(start, num_tokens, list(islice(block_ids, count))))
        return spans

    def heads(self, num_tokens: int) -> torch.Tensor:
        total = self.num_heads + 2 * self.num_kv_heads
        return torch.randn(num_tokens, total, self.head_dim, device="cuda", dtype=torch.bfloat16)

    def kv_bytes(self, num_tokens: int) -> int:
        """Of one layer."""
        return num_tokens * 2 * self.num_kv_heads * self.head_dim * self.kv.itemsize

    def decode(self, lengths: Sequence[int]) -> tuple[float, float]:
        """us of the GPU for one layer of a captured step, and us of the host to prepare it."""
        spans = self.spans([(length - 1, 1) for length in lengths])
        cuts = self.attention.cuts(spans, len(spans))
        step = self.attention.decode_graph(len(spans), spare_block=0, cuts=cuts)
        heads = self.heads(len(lengths))
        none = torch.zeros(len(lengths), 1, 2, self.head_dim // 2, device="cuda", dtype=torch.bfloat16)

        def run() -> None:
            for layer in self.layers:
                step.attend(layer, heads[:, : self.num_heads])

        step.rotate_and_store(self.layers[0], heads, Rotation(none[:, :, :1] + 1, none))
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        step.prepare(spans)
        us = 1e3 * gpu_ms(graph.replay) / len(self.layers)
        return us, host_us(lambda: step.prepare(spans))

    def prompts(self, sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """ms of the GPU for one layer of a step, and us of the host for its index tensors and plan."""
        spans = self.spans(sizes)
        heads = self.heads(sum(span.num_tokens for span in spans))
        none = torch.zeros(len(heads), 1, 2, self.head_dim // 2, device="cuda", dtype=torch.bfloat16)
        rotation = Rotation(none[:, :, :1] + 1, none)

        step = self.attention.begin_step(spans, None)
        step.rotate_and_store(self.layers[0], heads, rotation)

        def run() -> None:
            for layer in self.layers:
                step.attend(layer, heads[:, : self.num_heads])

        ms = gpu_ms(run) / len(self.layers)

        def prepare() -> None:
            group = self.attention.begin_step(spans, None).groups[0]
            assert isinstance(group, Group)
            group.plan_for(self.layers[0])

        return ms, host_us(prepare)

    def num_flops(self, sizes: Sequence[tuple[int, int]]) -> float:
        seen = sum(num_tokens * start + num_tokens * (num_tokens + 1) / 2 for start, num_tokens in sizes)
        return 4 * seen * self.num_heads * self.head_dim


def gpu_ms(run: Callable[[], None], rounds: int = 10) -> float:
    """Median of `rounds`, each after a write of more than the GPU's cache holds, which hides the launch as well."""
    run()
    flush = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


def host_us(run: Callable[[], object], rounds: int = 20) -> float:
    """Median; the device is idle each time."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pool-gb", type=float, default=36.0)
    parser.add_argument("--kv", choices=DTYPES, nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, vars(args))
    for name in args.kv:
        bench = Bench(args, DTYPES[name])
        print(f"{name}: decode rows x tokens | us a layer | TB/s of KV | us of host to prepare")
        for batch in DECODES:
            lengths = [length for num_rows, length in batch for _ in range(num_rows)]
            us, host = bench.decode(lengths)
            speed = bench.kv_bytes(sum(lengths)) / us / 1e6
            rows = " + ".join(f"{num_rows} x {length}" for num_rows, length in batch)
            print(f"  {rows:20} | {us:8.1f} | {speed:5.2f} | {host:6.0f}", flush=True)
        print(f"{name}: prompts x (context + tokens) | ms a layer | TFLOP/s | us of host to plan")
        for num_prompts, start, num_tokens in PROMPTS:
            sizes = [(start, num_tokens)] * num_prompts
            ms, host = bench.prompts(sizes)
            speed = bench.num_flops(sizes) / ms / 1e9
            print(
                f"  {num_prompts:3} x ({start:5} + {num_tokens:5}) | {ms:7.3f} | {speed:4.0f} | {host:6.0f}", flush=True
            )
        del bench


if __name__ == "__main__":
    main()
