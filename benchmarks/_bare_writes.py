"""What a server would pay for a token's event if it did nothing else: the floor of `benchmarks.frontend`.

A process on given cores writes as many bytes as one event has to each of many connections in turn, at a given pace,
over the event loop that the router has. What reads them is the load generator's process, as in the benchmark.
"""

import asyncio
import multiprocessing
import os
import time
from concurrent.futures import Executor
from multiprocessing.connection import Connection
from typing import cast

import uvloop

NUM_WRITES = 60_000
EVENT = b"b8\r\n" + b"x" * 184 + b"\r\n"  # the size of one token's


async def write_floor(num_connections: int, per_second: float, cores: set[int], reader: Executor) -> float:
    """Seconds of CPU a write, on `cores`, of `per_second` writes; `reader` has a process on others."""
    ours, theirs = multiprocessing.Pipe()
    args = (cores, num_connections, per_second, theirs)
    process = multiprocessing.get_context("spawn").Process(target=_write, args=args)
    process.start()
    theirs.close()  # so that its end is seen here
    loop = asyncio.get_running_loop()
    port = await loop.run_in_executor(None, ours.recv)
    await loop.run_in_executor(reader, _read, port, num_connections)
    seconds: float = await loop.run_in_executor(None, ours.recv)
    process.join()
    return seconds


def _write(cores: set[int], num_connections: int, per_second: float, parent: Connection) -> None:
    """Sends its port, then what a write costs."""
    os.sched_setaffinity(0, cores)
    parent.send(uvloop.run(_writes(num_connections, per_second, parent)))


def _read(port: int, num_connections: int) -> None:
    uvloop.run(_drain(port, num_connections))


async def _writes(num_connections: int, per_second: float, parent: Connection) -> float:
    writers: list[asyncio.Transport] = []
    ready = asyncio.Event()

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            writers.append(cast(asyncio.Transport, transport))
            if len(writers) == num_connections:
                ready.set()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Writer, "127.0.0.1", 0, backlog=2048)
    parent.send(server.sockets[0].getsockname()[1])
    await ready.wait()
    num_rounds, at, began = NUM_WRITES // num_connections, loop.time(), time.process_time()
    for _ in range(num_rounds):
        for writer in writers:
            writer.write(EVENT)
        at += num_connections / per_second
        await asyncio.sleep(max(0.0, at - loop.time()))
    spent = time.process_time() - began
    for writer in writers:
        writer.close()
    return spent / (num_rounds * num_connections)


async def _drain(port: int, num_connections: int) -> None:
    """Read from so many connections until all are closed."""
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    left = num_connections

    class Reader(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
            nonlocal left
            left -= 1
            if not left:
                closed.set()

    for _ in range(num_connections):
        await loop.create_connection(Reader, "127.0.0.1", port)
    await closed.wait()
