"""How much of a handoff prefill hides: a long prompt through a real local cluster, by its own timeline.

Makes a seeded Llama (8 layers, 512 hidden, 8 heads, 8 KV heads) unless --model names a checkpoint. The goal is that
the part of the transfer left over after prefill ends, which delays the second token, is under 5 % of prefill.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from cluster.launcher import LocalCluster
from cluster.spec_file import parse_spec


def make_model(path: Path, max_positions: int) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max_positions,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Prompts are token ids; the router only needs a tokenizer that names them."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(4096)}, unk_token="t0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


async def one(client: httpx.AsyncClient, model: str, prompt: list[int], output: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body, headers={"x-baton-timeline": "1"})
    response.raise_for_status()
    timeline: dict[str, Any] = response.json()["timeline"]
    return timeline


async def measure(url: str, args: argparse.Namespace) -> None:
    rng = random.Random(0)
    timelines = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for _ in range(args.rounds + 1):  # the first one warms up
            prompt = [rng.randrange(4096) for _ in range(args.input)]
            timelines.append(await one(client, model, prompt, args.output))
    print(f"{args.input} tokens in, {args.output} out, {args.rounds} rounds, medians")
    rows = timelines[1:]

    def median(field: str) -> float:
        return statistics.median(row[field] for row in rows)

    prefill, copied, exposed = median("prefill_s"), median("transfer_s"), median("exposed_s")
    print(f"prefill             {prefill:8.3f} s")
    print(
        f"KV moved            {median('transfer_blocks'):8.0f} blocks, {median('transfer_bytes') / 2**20:.0f} MiB, "
        f"over {rows[0]['transport']}"
    )
    print(f"copying             {1e3 * copied:8.2f} ms   {median('transfer_bytes') / copied / 1e9:.2f} GB/s")
    print(f"not hidden          {1e3 * exposed:8.2f} ms   {100 * exposed / prefill:.2f} % of prefill (goal: under 5 %)")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--input", type=int, default=4090, help="prompt tokens; the last block is then not full")
    parser.add_argument("--output", type=int, default=16, help="output tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transport", choices=["auto", "shared_memory", "tcp"], default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = args.model
        if model is None:
            model = str(make_model(root / "model", args.input + 1024))
            write_tokenizer(root / "model")
        spec = parse_spec(
            {
                "model": model,
                "run_dir": str(root / "run"),
                "router": {"port": 0, "local_prefill_max_tokens": 0},
                "transfer": {"transport": args.transport},
            }
        )
        async with LocalCluster(spec) as cluster:
            await measure(cluster.url, args)


if __name__ == "__main__":
    asyncio.run(main())
