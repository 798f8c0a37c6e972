"""Every kernel of engine/kernels against the time that memory needs for its bytes, in CUDA graphs.

The shape is Llama-3-8B's in bfloat16 with random numbers. A graph walks over as many different inputs as the
L2 cache cannot hold. The floor is bytes over the highest bandwidth that PyTorch's own kernels reach first; what is
only a few microseconds long is also bounded by the launch itself, so its floor is near zero.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.activation import gated
from engine.kernels.gemv import gemv, gemv_gated
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.rope_kv import rotate_and_store
from engine.kernels.select import draw, thresholds
from engine.kernels.skinny import MAX_ROWS, skinny_linear

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 4096, 32, 32, 8, 128, 14336, 128256
BEYOND_CACHE = 1 << 32  # bytes: the L2 cache could keep about one percent of them

# name, rows and columns of the weight, times a step
PRODUCTS = [
    ("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, LAYERS),
    ("o", HIDDEN, HEADS * HEAD_DIM, LAYERS),
    ("gate_up", 2 * FFN, HIDDEN, LAYERS),
    ("down", HIDDEN, FFN, LAYERS),
    ("head", VOCAB, HIDDEN, 1),
]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def graph_us(run: Callable[[], object], rounds: int = 9) -> float:
    """The median time in microseconds of `run` captured as a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[rounds // 2]


def bandwidths() -> dict[str, float]:
    """Bytes in a microsecond: copied by a kernel (read and written), copied by a node of a graph, and only read."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    num_bytes = 4 * source.numel()
    return {
        "kernel that copies": 2 * num_bytes / graph_us(lambda: torch.neg(source, out=target)),
        "copy node of a graph": 2 * num_bytes / graph_us(lambda: target.copy_(source)),
        "kernel that sums": num_bytes / graph_us(lambda: source.sum()),
    }


def report(name: str, us: float, num_bytes: float, bandwidth: float, beside: str = "") -> None:
    floor = num_bytes / bandwidth
    print(f"{name:34} {us:9.2f} us   floor {floor:8.2f} us   {floor / us:5.0%}   {beside}", flush=True)


def products(rows: int, bandwidth: float) -> None:
    """The products of `rows` tokens beside PyTorch's own."""
    total, library = 0.0, 0.0
    for name, num_out, num_in, times in PRODUCTS:
        num_bytes = 2 * num_out * num_in
        count = max(2, BEYOND_CACHE // num_bytes)
        weights = [random(num_out, num_in) for _ in range(count)]
        x = random(rows, num_in)
        product = product_kernel(name, rows)
        us = graph_us(lambda: [product(x, weight) for weight in weights]) / count  # noqa: B023
        linear = graph_us(lambda: [F.linear(x, weight) for weight in weights]) / count  # noqa: B023
        report(f"{name} {num_out} x {num_in}, {rows} rows", us, num_bytes, bandwidth, f"F.linear {linear:.2f} us")
        total, library = total + times * us, library + times * linear
    num_bytes = sum(2 * num_out * num_in * times for _, num_out, num_in, times in PRODUCTS)
    report(f"32 layers and the head, {rows} rows", total, num_bytes, bandwidth, f"F.linear {library:.2f} us")


def product_kernel(name: str, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    if rows > 1:
        return skinny_linear
    return (lambda x, w: gemv_gated(x, w, "silu")) if name == "gate_up" else gemv


def small_kernels(rows: int, bandwidth: float) -> None:
    hidden, delta, weight = random(rows, HIDDEN), random(rows, HIDDEN), torch.rand(HIDDEN, device="cuda")
    gate_up, heads = random(rows, 2 * FFN), random(rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
    cos, sin = random(rows, 1, 1, HEAD_DIM // 2), random(rows, 1, 2, HEAD_DIM // 2)
    pool, slots = random(512, LAYERS, 2, KV_HEADS, 16, HEAD_DIM), torch.arange(rows, device="cuda")
    row = 2 * rows * HIDDEN
    kv = 2 * 2 * rows * KV_HEADS * HEAD_DIM
    runs: list[tuple[str, float, Callable[[], object]]] = [
        ("rms_norm", 2 * row, lambda: rms_norm(hidden, weight, 1e-5)),
        ("add_rms_norm", 4 * row, lambda: add_rms_norm(hidden, delta, weight, 1e-5)),
        ("gated", 3 * 2 * rows * FFN, lambda: gated(gate_up, "silu")),
        (
            "rotate_and_store",
            2 * row + 3 * kv,
            lambda: rotate_and_store(heads, cos, sin, pool[:, 1], slots, HEADS, KV_HEADS),
        ),
    ]
    for name, num_bytes, run in runs:
        report(f"{name}, {rows} rows", graph_us(lambda: [run() for _ in range(50)]) / 50, num_bytes, bandwidth)  # noqa: B023


def selection(rows: int, bandwidth: float) -> None:
    logits = 3 * random(rows, VOCAB).float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    min_p = torch.zeros(rows, device="cuda")
    off, top_k = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.full((rows,), 50, device="cuda")
    one = torch.ones(rows, dtype=torch.float64, device="cuda")
    num_bytes = 4 * rows * VOCAB
    for name, k, p in (("top_k 50", top_k, one), ("top_p 0.9", off, 0.9 * one), ("both", top_k, 0.9 * one)):
        us = graph_us(lambda: thresholds(weights, min_p, k, p))  # noqa: B023
        report(f"thresholds, {name}, {rows} rows", us, num_bytes, bandwidth)
    least = thresholds(weights, min_p, top_k, 0.9 * one)
    report(f"draw, {rows} rows", graph_us(lambda: draw(weights, least, 0.5 * one)), num_bytes, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 64, 256])
    args = parser.parse_args()
    measured = bandwidths()
    bandwidth = max(measured.values())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        "TB/s: " + ", ".join(f"{name} {each / 1e6:.2f}" for name, each in measured.items()) + "; the floor's: the most"
    )
    for rows in args.rows:
        if rows <= MAX_ROWS:
            products(rows, bandwidth)
    for rows in args.rows:
        small_kernels(rows, bandwidth)
    for rows in args.rows:
        selection(rows, bandwidth)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
