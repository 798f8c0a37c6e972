"""Generation speed of the colocated engine against transformers' `generate`, in one process on the CPU.

Makes a seeded Llama (4 layers, 512 hidden, 8 heads, 4 KV heads, 1376 feed-forward, 32000 tokens) unless
--model names a checkpoint, and measures in the same threads and type, greedy: one request at a time,
--batch requests at once, and prefill of a long prompt in chunks. Rounds of the engine and of transformers
alternate and the best of each counts, so that another load on the machine hits both alike. The floors are
the time to read every weight once (for a decode step) and the model's matrix products alone (for prefill).
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from engine.engine import Engine
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.layers.linear import Linear
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig

VOCAB_SIZE = 32000


def make_model(path: Path, max_positions: int) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class EngineDriver:
    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        num_blocks = 64 + args.batch * (-(-(args.prompt + args.tokens) // 16) + 1) + -(-args.prefill // 16)
        options = TorchConfig(num_blocks=num_blocks, dtype=args.dtype, num_threads=args.threads)
        self.executor = TorchExecutor(path, options)
        config = SchedulerConfig(max_batch_tokens=args.chunk, max_num_seqs=min(64, args.chunk))
        self.engine = Engine(self.executor, config, secret="benchmark", model="benchmark")
        self.num_requests = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """All prompts at once; a salt keeps the prefix cache out of it."""
        outputs: dict[RequestId, list[int]] = {}
        for prompt in prompts:
            self.num_requests += 1
            request_id = RequestId(str(self.num_requests))
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            self.engine.submit(Request(request_id, tuple(prompt), len(prompt), params, seed=0, cache_salt=request_id))
            outputs[request_id] = []
        while (scheduled := self.engine.schedule()) is not None:
            for output in self.engine.run(scheduled):
                outputs[output.request_id].append(output.token_id)
        return list(outputs.values())


def best_seconds(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """The shortest time of each of `runs`, which take turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def matmul_seconds(executor: TorchExecutor, num_tokens: int) -> float:
    """The model's matrix products alone, layers only, for `num_tokens` at once."""
    layers = [module for module in executor._model.model.layers.modules() if isinstance(module, Linear)]
    sizes = {512: 0}
    inputs = {}
    for layer in layers:
        size = layer.packed.shape[1] if layer.packed is not None else layer.weight.shape[1]
        inputs[size] = torch.randn(num_tokens, size, dtype=executor._model.model.embed_tokens.weight.dtype)
        sizes[size] = 1

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            layer(inputs[layer.packed.shape[1] if layer.packed is not None else layer.weight.shape[1]])

    return best_seconds(5, run)[0]


def read_seconds(num_bytes: int) -> float:
    """Reading this much memory once, with all threads."""
    memory = torch.ones(num_bytes // 4)
    return best_seconds(5, lambda: memory.sum())[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: the seeded one)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=16, help="requests at once")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or make_model(Path(folder), args.prefill + args.tokens)
        measure(path, args)


def measure(path: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    driver = EngineDriver(path, args)
    dtype = getattr(torch, driver.executor.layout.dtype)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(driver.executor.vocab_size) for _ in range(args.prompt)] for _ in range(args.batch)]

    def reference_generate() -> list[int]:
        output = reference.generate(
            torch.tensor(prompts[:1]),
            attention_mask=torch.ones(1, args.prompt, dtype=torch.long),
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            do_sample=False,
        )
        return output[0, args.prompt :].tolist()

    same = driver.generate(prompts[:1], args.tokens)[0] == reference_generate()
    one, all_at_once, theirs = best_seconds(
        args.rounds,
        lambda: driver.generate(prompts[:1], args.tokens),
        lambda: driver.generate(prompts, args.tokens),
        reference_generate,
    )
    weights = sum(parameter.numel() * parameter.itemsize for parameter in reference.parameters())
    weights -= reference.get_input_embeddings().weight.nbytes if not reference.config.tie_word_embeddings else 0
    ours_rate, their_rate = args.tokens / one, args.tokens / theirs
    rate_at_once = args.batch * args.tokens / all_at_once
    print(
        f"{args.threads} threads, {dtype}, {args.prompt} prompt tokens, {args.tokens} generated, best of {args.rounds}"
    )
    print(f"same greedy tokens as transformers: {same}")
    print(f"one at a time: {ours_rate:.1f} tokens/s; transformers {their_rate:.1f}; ratio {ours_rate / their_rate:.2f}")
    floor = read_seconds(weights)
    print(f"    {1000 / ours_rate:.2f} ms a token; reading {weights >> 20} MiB of weights {floor * 1e3:.2f} ms")
    print(f"{args.batch} at once: {rate_at_once:.1f} tokens/s; {rate_at_once / ours_rate:.2f} times one at a time")
    measure_prefill(driver, reference, args, rng)


def measure_prefill(
    driver: EngineDriver, reference: torch.nn.Module, args: argparse.Namespace, rng: random.Random
) -> None:
    prompt = [rng.randrange(driver.executor.vocab_size) for _ in range(args.prefill)]

    @torch.inference_mode()
    def reference_prefill() -> None:
        reference(torch.tensor([prompt]), logits_to_keep=1)

    ours, theirs = best_seconds(args.rounds, lambda: driver.generate([prompt], 1), reference_prefill)
    products = matmul_seconds(driver.executor, args.chunk) * args.prefill / args.chunk
    print(
        f"prefill of {args.prefill} in chunks of {args.chunk}: {ours:.3f} s; "
        f"its matrix products alone {products:.3f} s; transformers in one piece {theirs:.3f} s"
    )


if __name__ == "__main__":
    main()
