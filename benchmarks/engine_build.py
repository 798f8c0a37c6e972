"""Time, engine size and peak memory of compiling one range of layers to a TensorRT engine ahead of time, without a GPU.

The range has the shape of Llama-3-8B's layers (4096 hidden, 32 heads, 8 KV heads of 128, 14336 feed-forward) and random
weights in 16 bits. Needs TensorRT-RTX. Peak memory is the process's largest resident set within each stage, the model
and what else is held from the stages before included.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from engine.executors.model_loading import load
from engine.executors.tensorrt.engine_build import BuildOptions, Profile, build_engine
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.library import Capability, load_library
from engine.executors.tensorrt.onnx_check import check_range
from engine.executors.tensorrt.onnx_export import export_range
from engine.model_config import load_model_config

GIB = 1 << 30
VOCAB_SIZE = 1024  # the range has no part in embedding and head
Result = TypeVar("Result")


def write_config(path: Path, num_layers: int, dtype: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": dtype,
    }
    (path / "config.json").write_text(json.dumps(config))


def measured(stage: str, run: Callable[[], Result]) -> Result:
    """Run and print its time, and the largest resident set in it."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, now = (int(status[name].split()[0]) * 1024 / GIB for name in ("VmHWM", "VmRSS"))
    print(f"{stage:<24}{seconds:8.1f} s   peak {peak:6.2f} GiB   after {now:6.2f} GiB", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--capability", type=Capability.parse, default="8.9")
    parser.add_argument("--tokens", type=int, default=2048, help="of a call, at most")
    parser.add_argument("--past", type=int, default=8192, help="tokens before those, at most")
    args = parser.parse_args()
    library = load_library("tensorrt", args.capability, ahead=True)
    profile = Profile((1, args.tokens, args.tokens), (1, min(args.tokens, args.past), args.past))
    options = BuildOptions(profile, args.capability)
    print(f"{library.title} for {args.capability}: {args.layers} layers, {args.dtype}, {profile}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_config(path, args.layers, args.dtype)
        config = load_model_config(path)
        device = torch.device("cpu")
        loaded = measured("random weights", lambda: load(path, config, args.dtype, device, dummy=True, progress=None))
        layers = LayerRange(loaded.model, 0, args.layers)
        num_bytes = sum(weight().nbytes for weight in layers.weights().values())
        onnx_path = measured("export", lambda: export_range(layers, path))
        report = measured("check in onnxruntime", lambda: check_range(layers, onnx_path))
        plan = measured("compile", lambda: build_engine(library, onnx_path, options))
    print(f"engine {plan.nbytes / GIB:.3f} GiB, weights {num_bytes / GIB:.3f} GiB; check: {report.worst}")


if __name__ == "__main__":
    main()
