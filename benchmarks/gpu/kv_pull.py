"""How fast KV moves between two processes that share a GPU, against the card's own copy in the same run.

    python -m benchmarks.gpu.kv_pull [--transport cuda_ipc|tcp] [--tokens 2048 8192 32768]

The child process is a source with a pool full of random KV of Llama-3-8B's shape; this process pulls, through the real
KvSource and KvSink. Everything becomes final at once: prefill hides nothing. In bytes of KV (each is read and written):

  copy     one tensor copied to another in this process: what the card's memory gives
  gather   what one announcement of everything has a copy thread do, in this one: the table of rows from the block ids,
           its way to the device, the kernel over the other process's memory, and waiting for it on the host
  pull     of a whole handoff, the time in which copies ran (as the metrics have it)
  handoff  offer in hand to KV confirmed: with the lease, announcements and confirmation

`gather` is the transport's; a transport whose reader maps nothing has none. Rounds alternate; medians are reported.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from threading import Event

import numpy as np
import torch

from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import BlockId, KvLayout
from engine.message_server import MessageServer
from kv_transfer.copy_stream import CopyStream
from kv_transfer.device_copier import DeviceCopier
from kv_transfer.fingerprint import fingerprint
from kv_transfer.link import layer_ranges
from kv_transfer.plan import plan_transfer
from kv_transfer.sink import KvSink, SinkConfig
from kv_transfer.source import KvSource
from kv_transfer.target import Target
from kv_transfer.transports.base import MappedReader, Run, ServerTransport, SinkTransport
from kv_transfer.transports.shared_memory import host_boot_id

TOKEN = "benchmark"
DEVICE = torch.device("cuda:0")
LAYOUT = KvLayout(32, 8, 128, 16, "bfloat16")  # Llama-3-8B
LAYER_GROUPS = (8, 16, 24, 32)
GIB = 1 << 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=["cuda_ipc", "tcp"], default="cuda_ipc")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--sink-block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="copy threads of the sink")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def server_of(name: str, memory: DeviceMemory) -> ServerTransport:
    if name == "cuda_ipc":
        from kv_transfer.transports.cuda_ipc import CudaIpcServer

        return CudaIpcServer(memory)
    from kv_transfer.transports.tcp_server import TcpServer

    return TcpServer(memory, host="127.0.0.1", token=TOKEN)


def sink_of(name: str) -> SinkTransport:
    if name == "cuda_ipc":
        from kv_transfer.transports.cuda_ipc import CudaIpcSink

        return CudaIpcSink(DEVICE)
    from kv_transfer.transports.tcp import TcpSink

    return TcpSink(TOKEN)


def scattered(num_blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in np.random.default_rng(0).permutation(num_blocks).tolist()]


async def run_source(args: argparse.Namespace, parent: Connection) -> None:
    memory = DeviceMemory(LAYOUT, LAYOUT.num_blocks_for(max(args.tokens)), DEVICE)
    memory.tensor.view(torch.int64).random_(generator=torch.Generator(DEVICE).manual_seed(1))
    torch.cuda.synchronize()
    transport = server_of(args.transport, memory)
    server = MessageServer("127.0.0.1", token=TOKEN)
    source = KvSource(
        worker_id="source",
        epoch="1",
        memory=memory,
        layer_groups=LAYER_GROUPS,
        fingerprint=fingerprint("benchmark", [LAYOUT], b""),
        link_address=server.address,
        transports=[transport],
        on_released=lambda _lease_id, _block_ids: None,
    )
    source.register(server)
    await server.start()
    parent.send((transport.address, transport.key(b"")))
    while (num_tokens := await asyncio.to_thread(parent.recv)) is not None:
        opened = source.open("r", scattered(memory.num_blocks)[: LAYOUT.num_blocks_for(num_tokens)], num_tokens)
        assert opened is not None
        source.finish(opened[0], 1, False)
        parent.send(opened[1])
    await server.stop()
    await source.close()


def source_process(args: argparse.Namespace, parent: Connection) -> None:
    asyncio.run(run_source(args, parent))


def timed(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_copy(source: torch.Tensor, sink: torch.Tensor) -> None:
    sink.copy_(source)
    torch.cuda.synchronize()


async def measure(args: argparse.Namespace, child: Connection) -> None:
    layout = KvLayout(32, 8, 128, args.sink_block_size, "bfloat16")
    ours = DeviceMemory(layout, layout.num_blocks_for(max(args.tokens)), DEVICE)
    sink_transport = sink_of(args.transport)
    sink = KvSink(
        worker_id="sink",
        memory=ours,
        fingerprint=fingerprint("benchmark", [layout], b""),
        token=TOKEN,
        transports=[sink_transport],
        boot_id=host_boot_id(),
        config=SinkConfig(copy_threads=args.threads),
    )
    address, key = await asyncio.to_thread(child.recv)
    gathers = args.transport == "cuda_ipc" and args.sink_block_size == LAYOUT.block_size
    reader = sink_transport.connect(address, key, ours.size) if gathers else None
    stream = CopyStream(DEVICE)
    print(
        f"{torch.cuda.get_device_name()}, {args.transport}, {len(LAYER_GROUPS)} layer groups,"
        f" sink blocks of {layout.block_size}"
    )
    for num_tokens in args.tokens:
        num_bytes = LAYOUT.num_blocks_for(num_tokens) * LAYOUT.block_bytes
        other = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
        times: dict[str, list[float]] = {"copy": [], "gather": [], "pull": [], "handoff": []}
        for _ in range(args.rounds + 1):  # the first warms up
            times["copy"].append(timed(partial(plain_copy, ours.tensor[: len(other)], other)))
            if isinstance(reader, MappedReader):
                times["gather"].append(gather(stream, reader, ours, num_tokens))
            started, pulled_s = await pull(sink, child, ours, num_tokens)
            times["pull"].append(pulled_s)
            times["handoff"].append(time.perf_counter() - started)
        del other
        report(num_tokens, num_bytes, times)
    await sink.close()
    if isinstance(reader, MappedReader):
        check(reader, ours, max(args.tokens))
        reader.close()


def gather(stream: CopyStream, reader: MappedReader, ours: DeviceMemory, num_tokens: int) -> float:
    """Seconds. The copier is made first, as a pull makes it before it opens its lease."""
    num_blocks = LAYOUT.num_blocks_for(num_tokens)
    target = Target(
        lease_id="",
        groups=layer_ranges(LAYER_GROUPS, LAYOUT),
        source_block_ids=scattered(ours.num_blocks)[:num_blocks],
        sink_block_ids=range(num_blocks),
        num_tokens=num_tokens,
        num_held_tokens=0,
    )
    copier = DeviceCopier(reader, plan_transfer([LAYOUT], LAYOUT), ours, target, stream)
    runs = [Run(group, 0, num_blocks) for group in range(len(LAYER_GROUPS))]
    ours.tensor.zero_()

    def work() -> None:
        bad, reason = copier.fetch(runs, Event())
        assert not bad, reason

    seconds = timed(work)
    check(reader, ours, num_tokens)
    return seconds


async def pull(sink: KvSink, child: Connection, ours: DeviceMemory, num_tokens: int) -> tuple[float, float]:
    """(when it began, seconds in which copies ran)"""
    child.send(num_tokens)
    offer = await asyncio.to_thread(child.recv)
    blocks = range(ours.layout.num_blocks_for(num_tokens))
    started = time.perf_counter()
    pulled = await sink.pull(offer, block_ids=blocks, num_held_tokens=0, deadline=time.monotonic() + 60)
    return started, pulled.copy_seconds


def check(reader: MappedReader, ours: DeviceMemory, num_tokens: int) -> None:
    """What came last is what the source has."""
    theirs = reader.memory.view(-1, LAYOUT.block_bytes)
    blocks = torch.tensor(scattered(len(theirs))[: LAYOUT.num_blocks_for(num_tokens)], device=DEVICE)
    mine = ours.tensor[: ours.size].view(-1, LAYOUT.block_bytes)
    assert torch.equal(theirs[blocks], mine[: len(blocks)]), "another content"


def report(num_tokens: int, num_bytes: int, times: Mapping[str, Sequence[float]]) -> None:
    print(f"{num_tokens} tokens, {num_bytes / GIB:.2f} GiB")
    medians = {name: statistics.median(values[1:]) for name, values in times.items() if values}
    for name, median in medians.items():
        best = min(times[name][1:])
        print(
            f"  {name:<8} {median * 1e3:7.3f} ms {num_bytes / median / 1e9:7.0f} GB/s"
            f"  {medians['copy'] / median:5.0%} of the copy  (best {best * 1e3:.3f} ms)"
        )


def main() -> None:
    args = parse()
    context = multiprocessing.get_context("spawn")
    child, parent = context.Pipe()
    process = context.Process(target=source_process, args=(args, parent), daemon=True)
    process.start()
    try:
        asyncio.run(measure(args, child))
        child.send(None)
        process.join(10)
    finally:
        process.kill()


if __name__ == "__main__":
    main()
