"""`baton router --workers N` on a real port. Without workers, a router is alive and not ready."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton import compose, router_processes
from cluster.addresses import free_port
from cluster.process import Command
from cluster.spec import RouterSpec
from cluster.spec_file import load_spec, parse_spec, save_spec
from cluster.supervisor import Backoff, ClusterFailed, Ended
from router.admission import AdmissionConfig
from router.dispatcher import DispatcherConfig
from router.flight import Slo
from router.placement import PlacementConfig
from router.policies import LeastLoaded, RoutingPolicy

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    fields = {
        "model": str(tmp_path),
        "load": "dummy",  # every byte is a token
        "engine": "simulated",
        "run_dir": str(tmp_path / "run"),
        "router": {"port": free_port("127.0.0.1"), "workers": 2},
        "prefill": {"replicas": 0},
        "simulated": {"step_base_s": 0.02},
    }
    save_spec(parse_spec(fields), tmp_path / "spec.yaml")
    return tmp_path / "spec.yaml"


@asynccontextmanager
async def started(command: str, spec_path: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    argv = (sys.executable, "-m", "baton", command, "--spec", str(spec_path), *options)
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def listening(parent: asyncio.subprocess.Process, spec_path: Path, count: int) -> set[int]:
    """Wait until `count` children listen on the router's port; their pids."""
    port = load_spec(spec_path).router.port
    async with asyncio.timeout(60):
        while True:
            children = psutil.Process(parent.pid).children()
            found = {
                child.pid
                for child in children
                if child.is_running()
                and any(each.laddr and each.laddr.port == port for each in child.net_connections())
            }
            if len(found) == count:
                return found
            await asyncio.sleep(0.05)  # nothing tells when


async def get(spec_path: Path, route: str) -> httpx.Response:
    """Over a new connection, which may go to either process."""
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        return await client.get(f"http://127.0.0.1:{load_spec(spec_path).router.port}{route}")


async def metric(spec_path: Path, name: str, **labels: str) -> float:
    """Sum of the samples with these labels."""
    families = text_string_to_metric_families((await get(spec_path, "/metrics")).text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def num_live_answers(spec_path: Path) -> float:
    return await metric(spec_path, "baton_http_responses_total", route="/live")


async def test_processes_share_port_and_metrics_are_started_again_and_end_with_the_router(spec_path: Path) -> None:
    async with started("router", spec_path) as router:
        first = await listening(router, spec_path, 2)
        answers = [(await get(spec_path, "/live")).status_code for _ in range(16)]
        assert answers == [200] * 16
        async with asyncio.timeout(10):  # the other process writes what it counted within a second
            while (seen := await num_live_answers(spec_path)) != 16:
                assert seen < 16
                await asyncio.sleep(0.05)
        killed = psutil.Process(min(first))
        killed.kill()
        await asyncio.to_thread(killed.wait, 10)
        assert await num_live_answers(spec_path) == 16
        now = await listening(router, spec_path, 2)
        assert len(now & first) == 1
        for _ in range(4):
            assert await num_live_answers(spec_path) == 16
        arguments = psutil.Process(min(now)).cmdline()
        metrics_dir = arguments[arguments.index("--metrics-dir") + 1]
        assert os.path.isdir(metrics_dir)  # noqa: ASYNC240
        router.send_signal(signal.SIGTERM)
        assert await router.wait() == 0
        assert not os.path.exists(metrics_dir)  # noqa: ASYNC240
        assert not any(psutil.pid_exists(pid) for pid in now)
        assert router.stderr is not None
        assert b"was killed by SIGKILL" in await router.stderr.read()


async def test_streams_of_all_processes_end_before_the_router_does(spec_path: Path) -> None:
    url = f"http://127.0.0.1:{load_spec(spec_path).router.port}/v1/completions"
    body = {
        "model": load_spec(spec_path).public_model_name,
        "prompt": list(range(40)),
        "max_tokens": 120,
        "stream": True,
    }

    async def stream() -> str:
        async with (
            httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as client,
            client.stream("POST", url, json=body | {"ignore_eos": True}) as answer,
        ):
            assert answer.status_code == 200
            return [line async for line in answer.aiter_lines() if line][-1]

    async with started("decode", spec_path), started("router", spec_path) as router:
        await listening(router, spec_path, 2)
        async with asyncio.timeout(30):
            ready = 0
            while ready < 8:  # in a row: both processes know the worker
                ready = ready + 1 if (await get(spec_path, "/ready")).status_code == 200 else 0
        streams = [asyncio.create_task(stream()) for _ in range(8)]
        async with asyncio.timeout(20):
            while await metric(spec_path, "baton_num_requests_running") < 8:
                pass
            while await metric(spec_path, "baton_index_lag_seconds_count") == 0:
                pass
        assert 0 < await metric(spec_path, "baton_worker_index_lag_seconds") < 10
        router.send_signal(signal.SIGTERM)
        assert not any(each.done() for each in streams)
        assert await asyncio.gather(*streams) == ["data: [DONE]"] * 8
        assert await asyncio.wait_for(router.wait(), 10) == 0


async def test_a_process_that_cannot_stay_up_ends_the_router(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = tmp_path / "tries"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho x >>{tries}.$9\nexit 3\n")  # $9: the number of the process
    program.chmod(0o755)
    monkeypatch.setattr(router_processes.sys, "executable", str(program))
    monkeypatch.setattr(router_processes, "_backoff", lambda: Backoff(first_s=0.01, longest_s=0.05))
    with pytest.raises(ClusterFailed, match=r"failed 4 times in a row .* the last time it ended with status 3"):
        async with asyncio.timeout(30):
            await router_processes.run_router_processes(load_spec(spec_path), spec_path, index=0)
    assert max(len(tries.with_suffix(f".{number}").read_text().split()) for number in (0, 1)) == 4
    assert "starting it again" in caplog.text


def test_a_process_that_ran_for_long_did_start(tmp_path: Path) -> None:
    command, stop = Command("router process 0", ("router",), {}, log=None), asyncio.Event()
    watch = router_processes.Watch([command], tmp_path, stop)
    for ran_for_s in (1.0, 1.0, 1.0, 30.0, 1.0, 1.0, 29.9):
        watch.ended(Ended(command, 1, ran_for_s, 0.5))
    assert (watch.failure, stop.is_set()) == ("", False)
    watch.ended(Ended(command, 1, 1.0, 0.5))
    assert watch.failure.startswith("router process 0 failed 4 times in a row within 30 s of its start")
    assert stop.is_set()


async def test_the_limits_of_a_spec_reach_its_router(spec_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        """With what a dispatcher was to be made of."""

    def make(_registry: object, policy: RoutingPolicy, config: DispatcherConfig, **_: object) -> None:
        raise Made(policy, config)

    monkeypatch.setattr(compose, "Dispatcher", make)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    fields = {"max_queue": 7, "max_running": 3, "slo": {"ttft_s": 2.0, "tpot_s": 0.05}, "policy": "least_loaded"}
    spec = load_spec(spec_path)
    spec = spec.model_copy(update={"router": RouterSpec.model_validate(fields)})
    with pytest.raises(Made) as made:
        await compose.run_router(spec)
    placement = PlacementConfig(AdmissionConfig(max_queue=7, max_running=3))
    assert made.value.args == (LeastLoaded(), DispatcherConfig(placement=placement, slo=Slo(2.0, 0.05)))


async def test_a_port_that_somebody_else_has_is_refused(spec_path: Path) -> None:
    somebody = await asyncio.start_server(lambda *_: None, "127.0.0.1", load_spec(spec_path).router.port)
    async with somebody, started("router", spec_path) as router:
        _, errors = await router.communicate()
    assert router.returncode == 1
    assert b"cannot be listened on" in errors


async def test_port_0_cannot_be_shared(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    save_spec(spec.model_copy(update={"router": spec.router.model_copy(update={"port": 0})}), tmp_path / "any.yaml")
    async with started("router", tmp_path / "any.yaml", "--workers", "3") as router:
        _, errors = await router.communicate()
    assert router.returncode == 2
    assert b"router.port: 0 is not allowed with 3 router processes" in errors


async def test_secrets_that_cannot_be_read_are_said_once(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    router = spec.router.model_copy(update={"api_key_file": str(tmp_path / "keys")})
    security = spec.security.model_copy(update={"token_file": str(tmp_path / "token")})
    save_spec(spec.model_copy(update={"router": router, "security": security}), tmp_path / "secret.yaml")
    async with started("router", tmp_path / "secret.yaml", "--workers", "2") as process:
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert errors.decode().splitlines() == [
        f"baton: {field}: '{tmp_path / name}' cannot be read: No such file or directory"
        for field, name in (("security.token_file", "token"), ("router.api_key_file", "keys"))
    ]
