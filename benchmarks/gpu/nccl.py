"""How fast KV goes through NCCL within one process, against the card's own copy in the same run.

    python -m benchmarks.gpu.nccl [--chunk-mib 8 16 32 64] [--communicators 1 2 4 8] [--tokens 8192]

One process sends to itself (communicators of one rank), so that no network is the limit: scattered blocks of
Llama-3-8B's KV to scattered blocks, every byte checked.

  copy     one tensor copied to another: what the card's memory gives
  cache    as many bytes within the L2 cache, by one launch of the kernel that packs: what a pass costs at least
  packed   scattered blocks -> chunk -> NCCL -> chunk -> scattered blocks, chunk after chunk, as the transport does it
           with its kernels; packing, sending and unpacking run on a stream each
  direct   every block by itself from where it lies to where it belongs, without packing, shared out among several
           communicators, each on a stream of its own

Packing makes three passes where a copy makes one. On an H200 it comes to 24 to 30 % of the copy, and with one
communicator 60 % is out of reach: chunks whose buffers stay in the cache (8 MiB) are so many that the sends alone take
twice the copy's time, and with larger ones three passes over the memory leave a third. Blocks that need no packing
reach 76 % with four communicators and 81 % with eight, if a graph launches them; from Python 33 and 40 %
(docs/decisions/0003-nccl-packing.md).

`eager`: launched from Python; `graph`: the same work as one CUDA graph, which is what the card itself can do. Rounds
alternate; medians are reported, in bytes of KV, and as a fraction of the copy.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from cupy.cuda import nccl

from engine.kv.layout import KvLayout
from kv_transfer.copy_stream import WIDEST, Rows
from kv_transfer.row_copy import RowCopy

LAYOUT = KvLayout(32, 8, 128, 16, "bfloat16")  # Llama-3-8B
BLOCK_BYTES = LAYOUT.block_bytes
DEVICE = torch.device("cuda:0")
DEPTH = 2  # buffers of each kind
MIB = 1 << 20
CACHED_BLOCKS = 4  # 8 MiB, and 8 MiB where they are copied to: both lie in the L2 cache


class Blocks:
    """All blocks of `source` go in a random order to other places in `sink`."""

    def __init__(self, num_blocks: int) -> None:
        self.source = torch.empty(num_blocks * BLOCK_BYTES, dtype=torch.uint8, device=DEVICE)
        self.source.view(torch.int64).random_(generator=torch.Generator(DEVICE).manual_seed(1))
        self.sink = torch.zeros_like(self.source)
        random = np.random.default_rng(0)
        self.froms, self.tos = random.permutation(num_blocks), random.permutation(num_blocks)

    def check(self) -> None:
        torch.cuda.synchronize()
        blocks, arrived = (each.view(-1, BLOCK_BYTES) for each in (self.source, self.sink))
        assert torch.equal(blocks[self.froms], arrived[self.tos])
        self.sink.zero_()


class Packed:
    """Through chunks of `chunk_bytes`."""

    def __init__(self, blocks: Blocks, communicator: nccl.NcclCommunicator, copier: RowCopy, chunk_bytes: int) -> None:
        self.blocks = blocks
        self.communicator = communicator
        self.copier = copier
        self.chunk_bytes = chunk_bytes
        self.per_chunk = chunk_bytes // BLOCK_BYTES
        count = len(blocks.froms)
        places, sizes = np.arange(count) % self.per_chunk * BLOCK_BYTES, np.full(count, BLOCK_BYTES)
        self.pack = self.tables(np.stack([blocks.froms * BLOCK_BYTES, places, sizes], axis=1))
        self.unpack = self.tables(np.stack([places, blocks.tos * BLOCK_BYTES, sizes], axis=1))
        self.sent = [torch.empty(chunk_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(DEPTH)]
        self.received = [torch.empty(chunk_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(DEPTH)]
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(3)]

    def tables(self, rows: Rows) -> list[torch.Tensor]:
        return list(torch.from_numpy(rows.astype(np.int64)).to(DEVICE).split(self.per_chunk))

    def run(self) -> None:
        """Submit everything; the current stream waits for it."""
        packing, sending, unpacking = self.streams
        fork(self.streams)
        free_to_pack: list[torch.cuda.Event] = []
        free_to_receive: list[torch.cuda.Event] = []
        for i, (pack, unpack) in enumerate(zip(self.pack, self.unpack, strict=True)):
            sent, received = self.sent[i % DEPTH], self.received[i % DEPTH]
            if i >= DEPTH:
                packing.wait_event(free_to_pack[i - DEPTH])
                sending.wait_event(free_to_receive[i - DEPTH])
            self.copy(self.blocks.source, sent, pack, packing)
            sending.wait_event(packing.record_event())
            pairs = [(sent.data_ptr(), received.data_ptr())]
            send(self.communicator, pairs, self.chunk_bytes, sending)
            free_to_pack.append(sending.record_event())
            unpacking.wait_event(free_to_pack[i])
            self.copy(received, self.blocks.sink, unpack, unpacking)
            free_to_receive.append(unpacking.record_event())
        join(self.streams)

    def copy(self, source: torch.Tensor, sink: torch.Tensor, table: torch.Tensor, stream: torch.cuda.Stream) -> None:
        addresses = source.data_ptr(), sink.data_ptr(), table.data_ptr()
        self.copier.launch(*addresses, len(table), WIDEST, BLOCK_BYTES, stream.cuda_stream)


class Direct:
    """Block by block, in one group of sends and receives for each communicator."""

    def __init__(self, blocks: Blocks, communicators: Sequence[nccl.NcclCommunicator]) -> None:
        source, sink, size = blocks.source.data_ptr(), blocks.sink.data_ptr(), BLOCK_BYTES
        pairs = [
            (source + int(start) * size, sink + int(end) * size)
            for start, end in zip(blocks.froms, blocks.tos, strict=True)
        ]
        self.shares = [pairs[i :: len(communicators)] for i in range(len(communicators))]
        self.communicators = communicators
        self.streams = [torch.cuda.Stream(DEVICE) for _ in communicators]

    def run(self) -> None:
        fork(self.streams)
        for communicator, pairs, stream in zip(self.communicators, self.shares, self.streams, strict=True):
            send(communicator, pairs, BLOCK_BYTES, stream)
        join(self.streams)


def send(
    communicator: nccl.NcclCommunicator, pairs: Sequence[tuple[int, int]], size: int, stream: torch.cuda.Stream
) -> None:
    nccl.groupStart()
    for sent, received in pairs:
        communicator.send(sent, size, nccl.NCCL_INT8, 0, stream.cuda_stream)
        communicator.recv(received, size, nccl.NCCL_INT8, 0, stream.cuda_stream)
    nccl.groupEnd()


def fork(streams: Sequence[torch.cuda.Stream]) -> None:
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())


def join(streams: Sequence[torch.cuda.Stream]) -> None:
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)


def cached_copies(copier: RowCopy, num_blocks: int) -> Callable[[], None]:
    """As many blocks as the others move, by one launch of the transport's kernel, of which few are different."""
    one, other = (torch.zeros(CACHED_BLOCKS * BLOCK_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    places = np.arange(num_blocks) % CACHED_BLOCKS * BLOCK_BYTES
    table = torch.from_numpy(np.stack([places, places, np.full(num_blocks, BLOCK_BYTES)], axis=1)).to(DEVICE)

    def run() -> None:
        addresses = one.data_ptr(), other.data_ptr(), table.data_ptr()
        copier.launch(*addresses, num_blocks, WIDEST, BLOCK_BYTES, torch.cuda.current_stream().cuda_stream)

    return run


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, blocks: Blocks, work: Callable[[], None], rounds: int, *, moves: bool = True) -> None:
    """`moves`: it brings the blocks where they belong."""
    other = torch.empty_like(blocks.source)
    work()
    if moves:
        blocks.check()
    graph = captured(work)
    graph.replay()
    if moves:
        blocks.check()
    works = {"copy": lambda: other.copy_(blocks.source), "eager": work, "graph": graph.replay}
    times: dict[str, list[float]] = {each: [] for each in works}
    for i in range(rounds + 1):  # the first warms up
        for each, one in works.items():
            seconds = timed(one)
            if i:
                times[each].append(seconds)
    medians = {each: statistics.median(values) for each, values in times.items()}
    figures = "  ".join(
        f"{each} {len(other) / seconds / 1e9:5.0f} GB/s ({medians['copy'] / seconds:4.0%})"
        for each, seconds in medians.items()
    )
    print(f"{name:<26} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--communicators", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    blocks = Blocks(LAYOUT.num_blocks_for(args.tokens))
    copier = RowCopy(DEVICE)
    print(f"{torch.cuda.get_device_name()}, NCCL {nccl.get_version()}, {len(blocks.froms)} blocks of {BLOCK_BYTES} B")
    communicators = [nccl.NcclCommunicator(1, nccl.get_unique_id(), 0) for _ in range(max(args.communicators))]
    try:
        measure("cache", blocks, cached_copies(copier, len(blocks.froms)), args.rounds, moves=False)
        for chunk_mib in args.chunk_mib:
            packed = Packed(blocks, communicators[0], copier, chunk_mib * MIB)
            measure(f"packed, {chunk_mib} MiB", blocks, packed.run, args.rounds)
        for count in args.communicators:
            direct = Direct(blocks, communicators[:count])
            measure(f"direct, {count} communicators", blocks, direct.run, args.rounds)
    finally:
        for communicator in communicators:
            communicator.destroy()


if __name__ == "__main__":
    main()
