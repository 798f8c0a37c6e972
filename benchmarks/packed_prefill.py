"""Several prompts in one call of a prefill engine against a call for each: by onnxruntime on the CPU, in milliseconds.

"packed" fills calls up to their limit, "apart" makes a call for each prompt, "chosen" is what a worker does: a prompt
joins a call unless the attention between prompts, which is computed for nothing, costs more than another call.

    python -m benchmarks.packed_prefill
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.attention.base import Span
from engine.executors.model_loading import load
from engine.executors.tensorrt.calls import cut
from engine.executors.tensorrt.forward import PrefillForward
from engine.executors.tensorrt.limits import call_limits, pairs_worth_a_call
from engine.executors.tensorrt.loading import OnnxLoader
from engine.kv.layout import KvLayout
from engine.model_config import load_model_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}
BLOCK_SIZE, MAX_TOKENS, MAX_PAST = 16, 2048, 8192
CASES = ((32, 16, 0), (8, 64, 0), (32, 64, 0), (8, 256, 0), (4, 512, 0), (2, 1024, 0), (4, 64, 1024), (4, 256, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the fastest counts (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        config = load_model_config(Path(directory))
        device = torch.device("cpu")
        loaded = load(Path(directory), config, "float32", device, dummy=True, progress=None)
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "float32")
    limits = call_limits(layout, "cpu", MAX_TOKENS, MAX_PAST)
    segments = OnnxLoader()(loaded, (config.num_layers,), limits)
    kv = torch.randn(layout.shape(MAX_PAST // BLOCK_SIZE))
    wasted = {"packed": math.inf, "apart": -1.0, "chosen": float(pairs_worth_a_call(config))}
    ways = {name: replace(limits, max_wasted_pairs=pairs) for name, pairs in wasted.items()}
    forwards = {name: PrefillForward(loaded.model, kv, segments, way, MAX_TOKENS) for name, way in ways.items()}
    print("prompts".rjust(22), *(name.rjust(10) for name in ways), "calls".rjust(10))
    for num, num_tokens, past in CASES:
        num_blocks = layout.num_blocks_for(past + num_tokens)
        spans = [Span(past, num_tokens, range(i * num_blocks, (i + 1) * num_blocks)) for i in range(num)]
        took = {name: math.inf for name in ways}
        for _ in range(args.rounds + 1):  # the first one warms up, and is the slowest
            for name, forward in forwards.items():
                took[name] = min(took[name], milliseconds(forward, spans))
        row = (f"{value:10.0f}" for value in took.values())
        print(
            f"{num} x {num_tokens} after {past}".rjust(22), *row, f"{len(cut(spans, ways['chosen'])):10d}", flush=True
        )


@torch.inference_mode()
def milliseconds(forward: PrefillForward, spans: Sequence[Span]) -> float:
    token_ids = torch.zeros(sum(span.num_tokens for span in spans), dtype=torch.int64)
    start = time.perf_counter()
    forward.run(token_ids, spans, None, None)
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
