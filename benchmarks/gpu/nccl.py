"""How fast KV is packed, sent, received and unpacked with NCCL, against the card's own copy in the same run.

    python -m benchmarks.gpu.nccl [--chunk-mib 4 8 16 32] [--tokens 8192]

One process sends to itself (a communicator of one rank), so that no network is the limit: scattered blocks of
Llama-3-8B's KV -> chunk -> NCCL -> chunk -> scattered blocks, chunk after chunk, with the kernels of the transport.
Packing, sending and unpacking run on a stream each. Every byte is read and written three times where a copy does it
once, so a third of the copy is what three passes over the card's memory can give; chunks whose buffers stayed in the
L2 cache all along could give more.

  copy     one tensor copied to another: what the card's memory gives
  eager    every kernel launched from Python, as the transport does; it is the host that limits small chunks
  graph    the same work as one CUDA graph: what the card itself can do

Rounds alternate; medians are reported, in bytes of KV, and as a fraction of the copy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from cupy.cuda import nccl

from engine.kv.layout import KvLayout
from kv_transfer.copy_stream import WIDEST, Rows
from kv_transfer.row_copy import copy_rows

LAYOUT = KvLayout(32, 8, 128, 16, "bfloat16")  # Llama-3-8B
DEVICE = torch.device("cuda:0")
DEPTH = 2  # buffers of each kind
MIB = 1 << 20


class SelfTransfer:
    """All blocks of `source` in a random order to other places in `sink`, through chunks of `chunk_bytes`."""

    def __init__(
        self, communicator: nccl.NcclCommunicator, num_blocks: int, chunk_bytes: int, num_processors: int
    ) -> None:
        size = LAYOUT.block_bytes
        self.communicator = communicator
        self.chunk_bytes = chunk_bytes
        self.num_processors = num_processors
        self.source = torch.empty(num_blocks * size, dtype=torch.uint8, device=DEVICE)
        self.source.view(torch.int64).random_(generator=torch.Generator(DEVICE).manual_seed(1))
        self.sink = torch.zeros_like(self.source)
        random = np.random.default_rng(0)
        self.source_blocks, self.sink_blocks = random.permutation(num_blocks), random.permutation(num_blocks)
        per_chunk = chunk_bytes // size
        places = np.arange(num_blocks) % per_chunk * size
        sizes = np.full(num_blocks, size)
        self.pack = tables(np.stack([self.source_blocks * size, places, sizes], axis=1), per_chunk)
        self.unpack = tables(np.stack([places, self.sink_blocks * size, sizes], axis=1), per_chunk)
        self.sent = [torch.empty(chunk_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(DEPTH)]
        self.received = [torch.empty(chunk_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(DEPTH)]
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(3)]

    def run(self) -> None:
        """Submit everything; the current stream waits for it."""
        packing, sending, unpacking = self.streams
        here = torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(here)
        free_to_pack: list[torch.cuda.Event] = []
        free_to_receive: list[torch.cuda.Event] = []
        for i, (pack, unpack) in enumerate(zip(self.pack, self.unpack, strict=True)):
            sent, received = self.sent[i % DEPTH], self.received[i % DEPTH]
            with torch.cuda.stream(packing):
                if i >= DEPTH:
                    packing.wait_event(free_to_pack[i - DEPTH])
                copy_rows(self.source, sent, pack, WIDEST, LAYOUT.block_bytes, self.num_processors)
                packed = packing.record_event()
            sending.wait_event(packed)
            if i >= DEPTH:
                sending.wait_event(free_to_receive[i - DEPTH])
            self.send(sent, received, sending)
            arrived = sending.record_event()
            free_to_pack.append(arrived)
            with torch.cuda.stream(unpacking):
                unpacking.wait_event(arrived)
                copy_rows(received, self.sink, unpack, WIDEST, LAYOUT.block_bytes, self.num_processors)
                free_to_receive.append(unpacking.record_event())
        for stream in self.streams:
            here.wait_stream(stream)

    def send(self, sent: torch.Tensor, received: torch.Tensor, stream: torch.cuda.Stream) -> None:
        nccl.groupStart()
        self.communicator.send(sent.data_ptr(), self.chunk_bytes, nccl.NCCL_INT8, 0, stream.cuda_stream)
        self.communicator.recv(received.data_ptr(), self.chunk_bytes, nccl.NCCL_INT8, 0, stream.cuda_stream)
        nccl.groupEnd()

    def check(self) -> None:
        torch.cuda.synchronize()
        blocks, arrived = (each.view(-1, LAYOUT.block_bytes) for each in (self.source, self.sink))
        assert torch.equal(blocks[self.source_blocks], arrived[self.sink_blocks])


def tables(rows: Rows, per_chunk: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(rows.astype(np.int64)).to(DEVICE).split(per_chunk))


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def timed(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(communicator: nccl.NcclCommunicator, num_blocks: int, chunk_bytes: int, args: argparse.Namespace) -> None:
    transfer = SelfTransfer(communicator, num_blocks, chunk_bytes, args.processors)
    transfer.run()
    transfer.check()
    graph = captured(transfer.run)
    transfer.sink.zero_()
    graph.replay()
    transfer.check()
    other = torch.empty_like(transfer.source)
    works = {"copy": lambda: other.copy_(transfer.source), "eager": transfer.run, "graph": graph.replay}
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(args.rounds + 1):  # the first warms up
        for name, work in works.items():
            seconds = timed(work)
            if i:
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    figures = "  ".join(
        f"{name} {len(other) / seconds / 1e9:5.0f} GB/s ({medians['copy'] / seconds:4.0%})"
        for name, seconds in medians.items()
    )
    print(f"chunks of {chunk_bytes // MIB:2} MiB: {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[8, 16, 32, 64])
    num_processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    parser.add_argument("--processors", type=int, default=num_processors, help="that pack, and that unpack")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    num_blocks = LAYOUT.num_blocks_for(args.tokens)
    print(f"{torch.cuda.get_device_name()}, NCCL {nccl.get_version()}, {num_blocks} blocks of {LAYOUT.block_bytes} B")
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    try:
        for chunk_mib in args.chunk_mib:
            measure(communicator, num_blocks, chunk_mib * MIB, args)
    finally:
        communicator.abort()


if __name__ == "__main__":
    main()
