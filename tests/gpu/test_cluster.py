"""A whole cluster on one GPU, from the HTTP request to the last token: one prefill and one decode process share it."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cluster.launcher import LocalCluster
from cluster.spec_file import parse_spec
from tests.checkpoints import make_checkpoint
from tests.gpu.test_executor import REAL_HEADS, greedy, random_prompts, reference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

NUM_TOKENS = 60
LENGTHS = (300, 37, 900, 90, 5, 650)


def gpu_cluster(checkpoint: Path, run_dir: Path, **fields: Any) -> LocalCluster:
    spec = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "device": "cuda",
        "run_dir": str(run_dir),
        "kv_cache": {"memory": "256MiB"},
        "scheduler": {"max_batch_tokens": 256, "max_num_seqs": 16},
        "router": {"port": 0, "local_prefill_max_tokens": 0},
        **fields,
    }
    return LocalCluster(parse_spec(spec), report=lambda _ended: None)


async def complete(
    client: httpx.AsyncClient, prompt: Sequence[int], saw: Callable[[], None] = lambda: None, **params: Any
) -> list[int]:
    """Greedy token ids; `saw` is called with each event."""
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **params,
    }
    token_ids: list[int] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return token_ids
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                token_ids += chunk["choices"][0]["token_ids"]
                saw()
    raise AssertionError("the stream ended without [DONE]")


async def until_attached(client: httpx.AsyncClient, num_workers: int) -> None:
    """A cluster is ready with its decode workers; its prefill workers may take a second more to be attached."""
    while sum(worker["attached"] for worker in (await client.get("/status")).json()["workers"]) < num_workers:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
async def test_tokens_over_http_equal_those_of_transformers(tmp_path: Path, transport: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    prompts = random_prompts(1, LENGTHS)
    model = reference(checkpoint, torch.float32)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    fields = {"dtype": "float32", "transfer": {"transport": transport}}
    async with (
        gpu_cluster(checkpoint, tmp_path / "run", **fields) as cluster,
        httpx.AsyncClient(base_url=cluster.url, timeout=60) as client,
    ):
        await until_attached(client, 2)
        found = await asyncio.gather(*(complete(client, prompt) for prompt in prompts))
        metrics = (await client.get("/metrics")).text
    assert found == expected
    used = "cuda_ipc" if transport == "auto" else transport
    assert f'transport="{used}"' in metrics


async def test_a_prefill_process_killed_in_mid_transfer_costs_no_token(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    prompts = random_prompts(2, LENGTHS)
    model = reference(checkpoint, torch.float32)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    async with gpu_cluster(checkpoint, tmp_path / "run", dtype="float32") as cluster:
        pending = [cluster.pids["prefill-0"]]

        def saw() -> None:
            if pending:
                os.kill(pending.pop(), signal.SIGKILL)

        async with httpx.AsyncClient(base_url=cluster.url, timeout=100) as client:
            found = await asyncio.gather(*(complete(client, prompt, saw) for prompt in prompts))
    assert found == expected


@pytest.mark.parametrize("options", [{}, {"kv_cache": {"memory": "256MiB", "dtype": "fp8"}}], ids=["bf16", "fp8"])
async def test_disaggregated_tokens_equal_colocated_ones(tmp_path: Path, options: dict[str, Any]) -> None:
    """One request at a time, so that the same kernels run in both; with FlashInfer and CUDA graphs."""
    heads = {**REAL_HEADS, "head_dim": 128}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama", **heads)
    prompts = random_prompts(3, LENGTHS)
    found = []
    for replicas in (1, 0):
        fields = {"dtype": "bfloat16", "prefill": {"replicas": replicas}, **options}
        async with (
            gpu_cluster(checkpoint, tmp_path / f"run{replicas}", **fields) as cluster,
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as client,
        ):
            found.append([await complete(client, prompt) for prompt in prompts])
    assert found[0] == found[1]
