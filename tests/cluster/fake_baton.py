"""Stands in for `python -m baton` under a launcher: workers join the registry, the router answers GET /status.

Each answer says of one more worker that it is attached. The spec's `served_model_name` says how it misbehaves:
`fail:NAME` makes that process end at start, with a message; with `unattached` the last worker is never attached.
"""

import asyncio
import itertools
import json
import signal
import sys
from pathlib import Path

from cluster.registry.base import WorkerRecord
from cluster.registry.open import open_registry
from cluster.spec import ClusterSpec, worker_id
from cluster.spec_file import load_spec


async def route(spec: ClusterSpec) -> None:
    total = spec.prefill.replicas + spec.decode.replicas
    most = total - (spec.public_model_name == "unattached")
    answers = itertools.count(1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        number = next(answers)
        workers = [{"usable": i < min(number, most)} for i in range(total)]
        body = json.dumps({"ready": True, "workers": workers, "number": number}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(answer, spec.router.host, spec.router.port):
        await until_sigterm()


async def work(spec: ClusterSpec, role: str, index: int) -> None:
    registry = open_registry(spec)
    record = WorkerRecord(worker_id(role, index), role, "127.0.0.1:1", 1, spec.public_model_name)
    async with registry.register(record):
        await until_sigterm()
    await registry.aclose()


async def until_sigterm() -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await asked.wait()


def main() -> None:
    role, _, path, _, index = sys.argv[1:]
    spec = load_spec(Path(path))
    if spec.public_model_name == f"fail:{role}-{index}":
        sys.exit("the checkpoint is made of cheese")
    asyncio.run(route(spec) if role == "router" else work(spec, role, int(index)))


main()
