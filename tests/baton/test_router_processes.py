"""`baton router --workers N` on a real port, over no workers: a router without them is alive and not ready."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.addresses import free_port
from cluster.spec_file import load_spec, parse_spec, save_spec
from tests.checkpoints import make_tokenizer


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path, 512)
    (tmp_path / "config.json").write_text("{}")
    router = {"port": free_port("127.0.0.1"), "workers": 2}
    fields = {"model": str(tmp_path), "engine": "simulated", "run_dir": str(tmp_path / "run"), "router": router}
    save_spec(parse_spec(fields), tmp_path / "spec.yaml")
    return tmp_path / "spec.yaml"


async def start(spec_path: Path, *options: str) -> asyncio.subprocess.Process:
    argv = (sys.executable, "-m", "baton", "router", "--spec", str(spec_path), *options)
    return await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)


@pytest.fixture
async def router(spec_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await start(spec_path)
    yield process
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
            await asyncio.sleep(0.1)  # nothing tells when


async def test_processes_share_the_port_are_started_again_and_end_with_the_router(
    router: asyncio.subprocess.Process, spec_path: Path
) -> None:
    first = await listening(router, spec_path, 2)
    killed = psutil.Process(min(first))
    killed.kill()
    await asyncio.to_thread(killed.wait, 10)
    now = await listening(router, spec_path, 2)
    assert len(now & first) == 1
    url = f"http://127.0.0.1:{load_spec(spec_path).router.port}/live"
    answers = []
    for _ in range(8):  # each over a new connection, which may go to either
        async with httpx.AsyncClient(trust_env=False) as client:
            answers.append((await client.get(url)).status_code)
    assert answers == [200] * 8
    router.send_signal(signal.SIGTERM)
    assert await router.wait() == 0
    assert not any(psutil.pid_exists(pid) for pid in now)
    assert router.stderr is not None
    assert b"was killed by SIGKILL" in await router.stderr.read()


async def test_a_port_that_somebody_else_has_is_refused(router: asyncio.subprocess.Process, spec_path: Path) -> None:
    await listening(router, spec_path, 2)
    second = await start(spec_path)
    _, errors = await second.communicate()
    assert second.returncode == 1
    assert b"cannot be listened on" in errors


async def test_port_0_cannot_be_shared(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    save_spec(spec.model_copy(update={"router": spec.router.model_copy(update={"port": 0})}), tmp_path / "any.yaml")
    process = await start(tmp_path / "any.yaml", "--workers", "3")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"router.port: 0 is not allowed with 3 router processes" in errors
