"""A cluster as its users run it: real processes, HTTP in front, workers killed and frozen under load.

One cluster of two workers of each role serves the whole module; every test leaves it complete again.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
import pytest
import pytest_asyncio

from cluster.launcher import LocalCluster
from cluster.spec_file import parse_spec
from tests.checkpoints import make_checkpoint

NUM_STREAMS = 16
NUM_TOKENS = 120
KEYS = ("k1", "k2")

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    root = tmp_path_factory.mktemp("cluster")
    checkpoint = make_checkpoint(root / "checkpoint", "llama", hidden_size=128, num_hidden_layers=4)
    (root / "keys").write_text("\n".join(KEYS))
    (root / "keys").chmod(0o600)
    spec = parse_spec(
        {
            "model": str(checkpoint),
            "served_model_name": "tiny",
            "dtype": "float32",
            "run_dir": str(root / "run"),
            "kv_cache": {"num_blocks": 600},
            "scheduler": {"max_batch_tokens": 64, "max_num_seqs": 32},
            "prefill": {"replicas": 2, "threads": 1},
            "decode": {"replicas": 2, "threads": 1},
            "router": {"port": 0, "local_prefill_max_tokens": 0, "api_key_file": str(root / "keys")},
        }
    )
    async with LocalCluster(spec, report=lambda _ended: None) as running:
        yield running


def client_of(cluster: LocalCluster, key: str = KEYS[0], timeout: float = 10) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, timeout=timeout, headers={"authorization": f"Bearer {key}"})


def prompts() -> list[list[int]]:
    return [[5 + (17 * i + 3 * j) % 500 for j in range(300 + 30 * i)] for i in range(NUM_STREAMS)]


async def stream(client: httpx.AsyncClient, prompt: Sequence[int], saw: Callable[[int], None]) -> list[int]:
    """Token ids of one streamed completion; fails on an error event or an end without [DONE].

    `saw` hears how many tokens there are, after each event.
    """
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": NUM_TOKENS,
        "temperature": 0.8,
        "seed": len(prompt),
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
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
                saw(len(token_ids))
    raise AssertionError("the stream ended without [DONE]")


async def all_streams(
    cluster: LocalCluster, disturb: Callable[[], None] = lambda: None, at_token: int = NUM_TOKENS
) -> list[list[int]]:
    """Run every prompt at once; `disturb` when the first stream has `at_token` tokens."""
    pending = [disturb]

    def saw(num_tokens: int) -> None:
        if num_tokens >= at_token and pending:
            pending.pop()()

    async with client_of(cluster, timeout=100) as client:
        return await asyncio.gather(*(stream(client, prompt, saw) for prompt in prompts()))


async def num_retries(cluster: LocalCluster) -> int:
    async with client_of(cluster) as client:
        counters = (await client.get("/status")).json()["counters"]
    return int(counters["attempts"]) - int(counters["requests"])


async def until_complete(cluster: LocalCluster) -> None:
    """Wait until the router sees two usable workers of each role again."""
    async with client_of(cluster) as client, asyncio.timeout(90):
        while True:
            status = (await client.get("/status")).json()
            if sum(worker["usable"] for worker in status["workers"]) == 4:
                return
            await asyncio.sleep(0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(cluster: LocalCluster) -> list[list[int]]:
    tokens = await all_streams(cluster)
    assert all(len(each) == NUM_TOKENS for each in tokens)
    assert await num_retries(cluster) == 0
    return tokens


# When the first stream has its first token most prompts are still being computed; later, all are decoding.
MOMENTS = pytest.mark.parametrize(("role", "at_token"), [("prefill", 1), ("decode", 1), ("decode", NUM_TOKENS // 2)])


@MOMENTS
async def test_streams_survive_a_killed_worker(
    cluster: LocalCluster, undisturbed: list[list[int]], role: str, at_token: int
) -> None:
    await until_complete(cluster)
    victim, before = cluster.pids[f"{role}-0"], await num_retries(cluster)
    assert await all_streams(cluster, lambda: os.kill(victim, signal.SIGKILL), at_token) == undisturbed
    assert await num_retries(cluster) > before, "nothing depended on the worker: the test shows nothing"
    await until_complete(cluster)
    assert cluster.pids[f"{role}-0"] != victim


@MOMENTS
async def test_streams_survive_a_frozen_worker(
    cluster: LocalCluster, undisturbed: list[list[int]], role: str, at_token: int
) -> None:
    await until_complete(cluster)
    victim, before = cluster.pids[f"{role}-1"], await num_retries(cluster)
    try:
        assert await all_streams(cluster, lambda: os.kill(victim, signal.SIGSTOP), at_token) == undisturbed
    finally:
        os.kill(victim, signal.SIGCONT)
    assert await num_retries(cluster) > before, "nothing depended on the worker: the test shows nothing"
    await until_complete(cluster)
    assert cluster.pids[f"{role}-1"] == victim


BAD_BODIES: list[tuple[int, bytes]] = [
    (400, b"{"),
    (400, b'{"prompt": "\xff\xfe"}'),
    (400, b'{"prompt": 7}'),
    (400, b'{"prompt": ""}'),
    (400, b'{"prompt": []}'),
    (400, b'{"prompt": [5, 6], "max_tokens": -3}'),
    (400, b'{"prompt": [5, 6], "n": 1000000000}'),
    (400, b'{"prompt": [5, 512]}'),
    (400, b'{"prompt": [-1]}'),
    (400, b'{"prompt": [5], "temperature": "hot"}'),
    (400, b'{"prompt": [5], "max_tokens": 100000}'),
    (400, b'{"prompt": [%s5]}' % (b"5," * 5000)),
    (400, b'{"prompt": ' + b"[" * 5000),
    (400, b'{"prompt": [5], "kv_transfer_params": {"x": 1}}'),
    (404, b'{"prompt": [5], "model": "another"}'),
]


@pytest.mark.parametrize(("status", "body"), BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_bad_input_gets_its_4xx_and_harms_nobody(cluster: LocalCluster, status: int, body: bytes) -> None:
    pids = cluster.pids
    async with client_of(cluster) as client:
        answer = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        good = await client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 2})
        assert good.status_code == 200, good.text
    assert cluster.pids == pids


async def test_each_key_of_the_file_is_a_tenant_with_a_prefix_cache_of_its_own(cluster: LocalCluster) -> None:
    await until_complete(cluster)
    body = {"prompt": [5 + 7 * i % 500 for i in range(100)], "max_tokens": 2}

    async def cached_tokens(key: str) -> int:
        async with client_of(cluster, key) as client:  # of one session, so that turns go where the last one went
            answer = await client.post("/v1/completions", json=body, headers={"x-session-id": "s"})
        return int(answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [await cached_tokens(key) for key in ("k1", "k1", "k2", "k2")] == [0, 96, 0, 96]
    async with client_of(cluster, "k3") as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 401


async def test_every_block_is_free_after_all_that(cluster: LocalCluster) -> None:
    await until_complete(cluster)
    async with client_of(cluster) as client, asyncio.timeout(40):
        while True:
            workers = (await client.get("/status")).json()["workers"]
            if all(worker["num_free_blocks"] == worker["num_blocks"] for worker in workers):
                return
            await asyncio.sleep(0.2)
