"""What a router would pay if it did nothing but hand bytes on: the floor of `benchmarks.frontend`.

A process on given cores hands each request on to a worker, and of each of the worker's frames one event to each client,
with plain system calls. The load generator's process is worker and clients at once: all clients ask at the same time,
and the worker answers all of them in each of its steps.
"""

import asyncio
import multiprocessing
import os
import select
import socket
import statistics
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from multiprocessing.connection import Connection

REQUEST = b"x" * 4500  # the size of 865 tokens of text
RECORD = b"x" * 24  # of one token of one request, in a frame
EVENT = b"b8\r\n" + b"x" * 184 + b"\r\n"  # the size of one token's
MAX_EVENTS = 60_000


@dataclass(frozen=True, slots=True)
class Relayed:
    """Seconds of CPU a request, and what the relay adds to the latency of one (median)."""

    cpu: float
    latency: float


async def relay_floor(
    num_connections: int, num_output: int, step_s: float, cores: set[int], others: Executor
) -> Relayed:
    """Of requests with `num_output` tokens, one in each `step_s`, handed on by `cores`; `others` has a process on
    other ones.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_relay, args=(cores, num_connections, theirs))
    process.start()
    theirs.close()  # so that its end is seen here
    loop = asyncio.get_running_loop()
    port = await loop.run_in_executor(None, ours.recv)
    num_rounds = max(1, min(300, MAX_EVENTS // (num_connections * num_output)))
    latency = await loop.run_in_executor(others, _drive, port, num_connections, num_output, step_s, num_rounds)
    cpu: float = await loop.run_in_executor(None, ours.recv)
    process.join()
    return Relayed(cpu / (num_rounds * num_connections), latency)


def _relay(cores: set[int], num_connections: int, parent: Connection) -> None:
    """Sends its port, then the seconds of CPU it took; ends when a connection does."""
    os.sched_setaffinity(0, cores)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as server, select.epoll() as epoll:
        parent.send(server.getsockname()[1])
        every = [server.accept()[0] for _ in range(1 + num_connections)]
        for connection in every:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            epoll.register(connection, select.EPOLLIN)
        worker, *clients = (connection.fileno() for connection in every)
        received, turn, began, open_ = 0, 0, time.process_time(), True
        while open_:
            for descriptor, _ in epoll.poll():
                data = os.read(descriptor, 1 << 16)
                open_ &= bool(data)
                if descriptor != worker:
                    os.write(worker, data)
                    continue
                received += len(data)
                while received >= len(RECORD):
                    os.write(clients[turn], EVENT)
                    received -= len(RECORD)
                    turn = (turn + 1) % num_connections
        parent.send(time.process_time() - began)
        for connection in every:
            connection.close()


def _drive(port: int, num_connections: int, num_output: int, step_s: float, num_rounds: int) -> float:
    """Seconds that an answer took beyond the worker's steps (median)."""
    worker, *clients = every = [socket.create_connection(("127.0.0.1", port)) for _ in range(1 + num_connections)]
    for connection in every:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    beyond = []
    for _ in range(num_rounds):
        began, steps = time.perf_counter(), 0.0
        for client in clients:
            client.sendall(REQUEST)
        _receive(worker, num_connections * len(REQUEST))
        for _ in range(num_output):
            step_began = time.perf_counter()
            time.sleep(step_s)
            steps += time.perf_counter() - step_began
            worker.sendall(RECORD * num_connections)
            for client in clients:
                _receive(client, len(EVENT))
        beyond.append(time.perf_counter() - began - steps)
    for connection in every:
        connection.close()
    return statistics.median(beyond)


def _receive(connection: socket.socket, num_bytes: int) -> None:
    while num_bytes:
        data = connection.recv(num_bytes)
        if not data:
            raise ConnectionError("the bare relay ended")
        num_bytes -= len(data)
