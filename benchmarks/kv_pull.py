"""How fast KV moves between two processes, against the floor of the same machine in the same run.

    python -m benchmarks.kv_pull [--transport shared_memory|tcp]

The child process is a source with a pool full of random KV; this process pulls. Shared memory is compared with one
memcpy of as many bytes by one thread, TCP with a plain socket copy between two processes (`sendall` and `recv_into`).
A pull is the whole handoff: lease, checksums at the source, copy, verification of every piece, confirmation. It is
timed twice: with everything announced before the first copy (as when prefill was slower than the transfer, so that
the source's checksums were hidden behind it), and with everything becoming final at once, so that source and sink
hash and copy on the same cores at the same time. All memory is touched before anything is timed; rounds alternate
between floor and pulls; medians are reported.
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from threading import Event

import numpy as np

from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory
from engine.message_server import MessageServer
from kv_transfer.checksum import checksum
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import KvSink, SinkConfig
from kv_transfer.source import KvSource
from kv_transfer.transports.base import (
    Arrived,
    Fetch,
    MappedReader,
    PieceReader,
    ServerTransport,
    SinkTransport,
    StageReader,
)
from kv_transfer.transports.shared_memory import SharedMemoryServer, SharedMemorySink, host_boot_id
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer

TOKEN = "benchmark"
GIB = 1 << 30
AHEAD_S = 0.5
ANNOUNCED = "pull, announced before"
AT_ONCE = "pull, final all at once"
CHECKSUMS = "checksums at the source"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=["shared_memory", "tcp"], help="default: both, one after the other")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--sink-block-size", type=int, default=None, help="default: as the source")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layer-groups", type=int, default=1, help="groups of layers that are announced on their own")
    parser.add_argument("--gib", type=float, default=1.0, help="KV to move in each round")
    parser.add_argument("--threads", type=int, default=2, help="copy threads of the sink")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def layout_of(args: argparse.Namespace, block_size: int) -> KvLayout:
    return KvLayout(args.layers, args.kv_heads, args.head_dim, block_size, args.dtype)


def num_tokens_of(args: argparse.Namespace) -> int:
    layout = layout_of(args, args.block_size)
    return max(1, round(args.gib * GIB / layout.block_bytes)) * args.block_size


def fill(memory: HostMemory) -> None:
    for block in range(memory.num_blocks):
        memory.block(block)[:] = np.random.default_rng(block).bytes(memory.layout.block_bytes)


async def run_source(args: argparse.Namespace, parent: Connection) -> None:
    layout = layout_of(args, args.block_size)
    num_tokens = num_tokens_of(args)
    memory = HostMemory(layout, layout.num_blocks_for(num_tokens))
    fill(memory)
    transport: ServerTransport = (
        SharedMemoryServer(memory)
        if args.transport == "shared_memory"
        else TcpServer(memory, host="127.0.0.1", token=TOKEN)
    )
    server = MessageServer("127.0.0.1", token=TOKEN)
    source = KvSource(
        worker_id="source",
        epoch="1",
        memory=memory,
        layer_groups=[layout.num_layers * (i + 1) // args.layer_groups for i in range(args.layer_groups)],
        fingerprint=fingerprint("benchmark", [layout], b""),
        link_address=server.address,
        transports=[transport],
        on_released=lambda _lease_id, _block_ids: None,
    )
    source.register(server)
    await server.start()
    loop = asyncio.get_running_loop()
    while (command := await loop.run_in_executor(None, parent.recv)) != "stop":
        if command == "offer":
            blocks = np.random.default_rng(0).permutation(memory.num_blocks).tolist()
            lease_id, offer = source.open("r", blocks, num_tokens) or ("", b"")
            source.finish(lease_id, 1, False)
            parent.send(offer)
        elif command == "checksums":
            started = time.perf_counter()
            for block in range(memory.num_blocks):
                checksum(memory.block(block))
            parent.send(time.perf_counter() - started)
        else:
            await loop.run_in_executor(None, send_plainly, command, memory)
    await server.stop()
    await source.close()
    memory.close()


def send_plainly(port: int, memory: HostMemory) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(memory.buffer)


def source_process(args: argparse.Namespace, parent: Connection) -> None:
    asyncio.run(run_source(args, parent))


class Gate:
    """A transport whose reads wait until it is opened."""

    def __init__(self, inner: SinkTransport) -> None:
        self.name = inner.name
        self.opened = Event()
        self._inner = inner

    def connect(self, address: str, key: bytes, size: int) -> PieceReader:
        reader = self._inner.connect(address, key, size)
        assert not isinstance(reader, MappedReader | StageReader)
        return GatedReader(reader, self.opened)


class GatedReader:
    def __init__(self, inner: PieceReader, opened: Event) -> None:
        self.name = inner.name
        self.batch_bytes = inner.batch_bytes
        self._inner = inner
        self._opened = opened

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:
        self._opened.wait()
        self._inner.read(lease_id, fetches, arrived, stop)

    def close(self) -> None:
        self._inner.close()


def plain_copy(ours: HostMemory, other: HostMemory) -> float:
    started = time.perf_counter()
    np.copyto(np.frombuffer(ours.buffer, np.uint8), np.frombuffer(other.buffer, np.uint8))
    return time.perf_counter() - started


def plain_receive(ours: HostMemory, child: Connection) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            started = time.perf_counter()
            num_received = 0
            while num_received < ours.size:
                num_received += connection.recv_into(ours.buffer[num_received:], 0, socket.MSG_WAITALL)
            return time.perf_counter() - started


async def pull_once(sink: KvSink, ours: HostMemory, child: Connection, gate: Gate, ahead_s: float) -> float:
    """Seconds from the opening of the gate, which is `ahead_s` after the pull was started."""
    gate.opened.clear()
    child.send("offer")
    offer = await asyncio.to_thread(child.recv)
    if not ahead_s:
        gate.opened.set()
    started = time.perf_counter()
    pull = asyncio.create_task(
        sink.pull(offer, block_ids=range(ours.num_blocks), num_held_tokens=0, deadline=time.monotonic() + 60)
    )
    if ahead_s:
        await asyncio.sleep(ahead_s)
        started = time.perf_counter()
        gate.opened.set()
    await pull
    return time.perf_counter() - started


async def measure(args: argparse.Namespace, child: Connection) -> None:
    layout = layout_of(args, args.sink_block_size or args.block_size)
    ours = HostMemory(layout, layout.num_blocks_for(num_tokens_of(args)))
    fill(ours)
    other = HostMemory(layout, ours.num_blocks)  # the same kind of pages as the source's
    fill(other)
    gate = Gate(SharedMemorySink() if args.transport == "shared_memory" else TcpSink(TOKEN))
    sink = KvSink(
        worker_id="sink",
        memory=ours,
        fingerprint=fingerprint("benchmark", [layout], b""),
        token=TOKEN,
        transports=[gate],
        boot_id=host_boot_id(),
        config=SinkConfig(copy_threads=args.threads),
    )
    floor = "memcpy, one thread" if args.transport == "shared_memory" else "plain socket"
    times: dict[str, list[float]] = {floor: [], ANNOUNCED: [], AT_ONCE: [], CHECKSUMS: []}
    await pull_once(sink, ours, child, gate, 0.0)
    plain_copy(ours, other)
    for _ in range(args.rounds):
        times[floor].append(
            await asyncio.to_thread(plain_copy, ours, other)
            if args.transport == "shared_memory"
            else await asyncio.to_thread(plain_receive, ours, child)
        )
        times[ANNOUNCED].append(await pull_once(sink, ours, child, gate, AHEAD_S))
        times[AT_ONCE].append(await pull_once(sink, ours, child, gate, 0.0))
        child.send("checksums")
        times[CHECKSUMS].append(await asyncio.to_thread(child.recv))
    report(args, floor, times)
    await sink.close()
    ours.close()
    other.close()


def report(args: argparse.Namespace, floor: str, times: dict[str, list[float]]) -> None:
    piece = layout_of(args, args.block_size).block_bytes // args.layer_groups
    gib = num_tokens_of(args) // args.block_size * layout_of(args, args.block_size).block_bytes / GIB
    print(f"{gib:.2f} GiB in pieces of {piece >> 10} KiB over {args.transport}, {args.threads} copy threads")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"  {name:<28} median {gib / median:6.2f} GiB/s ({median * 1e3:4.0f} ms), best {min(values) * 1e3:4.0f} ms"
        )
    for name in (ANNOUNCED, AT_ONCE):
        ratio = statistics.median(base / value for base, value in zip(times[floor], times[name], strict=True))
        print(f"  {name} against {floor}: {ratio:.0%} (median of the rounds)")


def main() -> None:
    args = parse()
    for transport in [args.transport] if args.transport else ["shared_memory", "tcp"]:
        run(argparse.Namespace(**{**vars(args), "transport": transport}))


def run(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    child, parent = context.Pipe()
    process = context.Process(target=source_process, args=(args, parent), daemon=True)
    process.start()
    try:
        asyncio.run(measure(args, child))
        child.send("stop")
        process.join(10)
    finally:
        process.kill()


if __name__ == "__main__":
    main()
