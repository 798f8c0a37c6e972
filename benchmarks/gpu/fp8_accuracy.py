"""What FP8 weights and FP8 KV cost in accuracy against bfloat16, through the executor.

Makes random weights for a Llama of --layers layers in the shape of Llama-3-8B and random token ids (or takes the
checkpoint --model, such as baton/demo_weights, and text: Python's language reference), feeds the same to each variant,
a prompt in chunks and the rest token by token, and compares the logits of every position: the mean Kullback-Leibler
divergence of the next-token distributions, how often the most likely token is the same, and the largest error of a
logit. The noise of bfloat16 itself is the first row: the same weights with the prompt cut otherwise. Random weights
have flat distributions and no outliers, so that a trained checkpoint may lose more or less.
"""

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from engine.executors.base import Batch, Chunk
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.request import RequestId
from router.tokenizer import load_tokenizer

BLOCK_SIZE = 16
HEAD_DIM = 128


def write_config(path: Path, args: argparse.Namespace) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 7 // 2,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // HEAD_DIM,
        "num_key_value_heads": max(1, args.hidden // HEAD_DIM // 4),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def text_ids(path: Path) -> Iterator[int]:
    """Without end."""
    return itertools.cycle(load_tokenizer(path).encode("\n\n".join(topics.values()), add_special_tokens=False))


def random_ids(vocab_size: int) -> Iterator[int]:
    rng = random.Random(0)
    while True:
        yield rng.randrange(vocab_size)


def all_logits(path: Path, args: argparse.Namespace, chunk: int, **options: Any) -> Tensor:
    """[sequence, position, vocab] float32 on the host: chunks of `chunk` tokens, then --decode single tokens."""
    length = args.prompt + args.decode
    blocks_each = -(-length // BLOCK_SIZE)
    config = TorchConfig(
        device=args.device,
        load="auto" if args.model else "dummy",
        dtype="bfloat16",
        num_blocks=args.sequences * blocks_each,
        block_size=BLOCK_SIZE,
        cuda_graphs=False,  # a graph would hide its logits
        **options,
    )
    executor = TorchExecutor(path, config)
    recorded: list[Tensor] = []
    compute = executor._model.logits

    def record(hidden: Tensor) -> Tensor:
        logits = compute(hidden)
        recorded.append(logits.float().cpu())
        return logits

    executor._model.logits = record  # type: ignore[method-assign]
    # One more than is fed: the last position, too, is asked about its next token.
    ids = text_ids(path) if args.model else random_ids(executor.vocab_size)
    sequences = [list(itertools.islice(ids, length + 1)) for _ in range(args.sequences)]
    ends = [*range(chunk, args.prompt, chunk), *range(args.prompt, length + 1)]
    steps = []
    for start, end in zip([0, *ends], ends, strict=False):
        chunks = [
            Chunk(
                RequestId(str(i)),
                tokens[start:end],
                start,
                [i + args.sequences * j for j in range(blocks_each)],
                prompt_logprobs=1,
                next_token_ids=tokens[start + 1 : end + 1],
            )
            for i, tokens in enumerate(sequences)
        ]
        executor.submit(Batch(chunks)).result()
        steps.append(torch.cat(recorded).view(args.sequences, end - start, -1))
        recorded.clear()
    executor.close()
    return torch.cat(steps, dim=1)


def report(name: str, exact: Tensor, found: Tensor) -> None:
    assert found.isfinite().all(), name
    divergence = same = 0.0
    for p, q in zip(exact.log_softmax(-1), found.log_softmax(-1), strict=True):  # sequence by sequence, for memory
        divergence += (p.exp() * (p - q)).sum(-1).mean().item() / len(exact)
        same += (p.argmax(-1) == q.argmax(-1)).float().mean().item() / len(exact)
    print(f"{name:32} {divergence:12.2e} {same:12.1%} {(exact - found).abs().max().item():18.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, help="checkpoint directory, not quantized (default: random weights)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64)
    args = parser.parse_args()
    variants: dict[str, dict[str, Any]] = {"FP8 weights": {"quantization": "fp8"}}
    if args.device == "cuda":
        variants["FP8 KV"] = {"kv_dtype": "fp8"}
        variants["FP8 weights and KV"] = {"quantization": "fp8", "kv_dtype": "fp8"}
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or write_config(Path(folder), args)
        exact = all_logits(path, args, args.chunk)
        num_positions = exact.shape[0] * exact.shape[1]
        print(f"{args.device}, {args.model or f'random weights, {args.layers} layers of {args.hidden}'}", end="; ")
        print(f"{num_positions} positions, standard deviation of a logit {exact.std().item():.2f}")
        print(f"{'against bfloat16':32} {'mean KL':>12} {'same top 1':>12} {'largest error':>18}")
        report("bfloat16, cut otherwise", exact, all_logits(path, args, args.chunk * 2))
        for name, options in variants.items():
            report(name, exact, all_logits(path, args, args.chunk, **options))


if __name__ == "__main__":
    main()
