"""NVIDIA Dynamo's front with its own simulated workers: the peer that `benchmarks.frontend` measures beside Baton.

It runs in a Python of its own, as its package wants other versions than Baton, with files for discovery: no etcd, no
NATS. Everything is at its defaults but what says where things are, that nothing is logged for each request, and that
the workers take no time.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import httpx

START_S = 90.0


@asynccontextmanager
async def dynamo(
    python: str, model: str, run_dir: Path, *, front: set[int], rest: set[int], tokenizer: str
) -> AsyncIterator[tuple[str, int]]:
    """Its URL and the front's process id. The front runs on the cores `front`; one prefill and one decode worker, and
    so every request is handed off, on the others. Raises RuntimeError when it does not start."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        **os.environ,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(run_dir / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_HTTP_HOST": "127.0.0.1",
        "DYN_LOG": "warn",
    }
    workers = ["--model-path", model, "--speedup-ratio", "1000000", "--max-num-seqs", "512"]
    workers += ["--num-gpu-blocks-override", "100000", "--disaggregation-mode"]
    commands = [
        (front, ("dynamo.frontend", "--http-port", str(port), "--router-mode", "kv", "--tokenizer", tokenizer)),
        (rest, ("dynamo.mocker", *workers, "prefill")),
        (rest, ("dynamo.mocker", *workers, "decode")),
    ]
    async with AsyncExitStack() as stack:
        log = stack.enter_context((run_dir / "dynamo.log").open("ab"))
        processes = []
        for cores, command in commands:
            process = await asyncio.create_subprocess_exec(
                python,
                "-m",
                *command,
                env=env,
                stdout=log,
                stderr=log,
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
            stack.push_async_callback(_stop, process)
            processes.append(process)
        if not await _is_ready(url, model, processes):
            raise RuntimeError(f"Dynamo did not start:\n{_end_of(run_dir / 'dynamo.log')}")
        yield url, processes[0].pid


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def _is_ready(url: str, model: str, processes: list[asyncio.subprocess.Process]) -> bool:
    request = {"model": model, "prompt": "a", "max_tokens": 2}
    async with httpx.AsyncClient(timeout=5) as client:
        with suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                while all(process.returncode is None for process in processes):
                    with suppress(httpx.TransportError):
                        if (await client.post(f"{url}/v1/completions", json=request)).status_code == 200:
                            return True
                    await asyncio.sleep(0.5)
    return False


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
