"""KV between two processes that share a GPU, and what happens to one when the other dies."""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from random import Random
from threading import Event, Thread

import numpy as np
import pytest
import torch

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from engine.message_server import MessageServer
from kv_transfer.copy_stream import CopyStream, Part, RowTable
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import KvSink
from kv_transfer.source import KvSource
from kv_transfer.transports.cuda_ipc import CudaIpcReader, CudaIpcServer, CudaIpcSink
from kv_transfer.transports.shared_memory import host_boot_id
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer
from tests.kv_transfer.pair import FIRST_TOKEN, pair, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAYOUT = KvLayout(8, 4, 64, 16, "bfloat16")
NUM_BLOCKS = 512
TOKEN = "a token"
CUDA = torch.device("cuda:0")


def random_pool(layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS) -> DeviceMemory:
    """The same in every process."""
    memory = DeviceMemory(layout, num_blocks, CUDA)
    random = torch.Generator(CUDA).manual_seed(1)
    memory.tensor.view(torch.int64).random_(generator=random)
    torch.cuda.synchronize()
    return memory


@asynccontextmanager
async def source_over(memory: DeviceMemory, ipc: CudaIpcServer, released: list[str]) -> AsyncIterator[KvSource]:
    server = MessageServer("127.0.0.1", token=TOKEN)
    source = KvSource(
        worker_id="source",
        epoch=str(os.getpid()),
        memory=memory,
        layer_groups=(3, 8),
        fingerprint=fingerprint("model", [LAYOUT], b""),
        link_address=server.address,
        transports=[ipc, TcpServer(memory, host="127.0.0.1", token=TOKEN)],
        on_released=lambda lease_id, _: released.append(lease_id),
    )
    source.register(server)
    await server.start()
    try:
        yield source
    finally:
        await server.stop()
        await source.close()


def offer_all(source: KvSource, num_tokens: int) -> bytes:
    """In blocks that are not neighbours, all final."""
    blocks = [(5 * i) % NUM_BLOCKS for i in range(LAYOUT.num_blocks_for(num_tokens))]
    opened = source.open("r", blocks, num_tokens)
    assert opened is not None
    source.finish(opened[0], FIRST_TOKEN, False)
    return opened[1]


def sink_over(memory: DeviceMemory, *transports: object) -> KvSink:
    return KvSink(
        worker_id="sink",
        memory=memory,
        fingerprint=fingerprint("model", [memory.layout], b""),
        token=TOKEN,
        transports=list(transports or [CudaIpcSink(CUDA)]),
        boot_id=host_boot_id(),
    )


async def serve_source(parent: Connection) -> None:
    """Another process: says the transport's address and key, then makes an offer for each number it is sent."""
    memory = random_pool()
    ipc = CudaIpcServer(memory)
    async with source_over(memory, ipc, []) as source:
        parent.send((ipc.address, ipc.key(b""), memory.size))
        while (num_tokens := await asyncio.to_thread(parent.recv)) is not None:
            parent.send(offer_all(source, num_tokens))
    parent.send("bye")
    memory.close()


async def serve_sink(parent: Connection) -> None:
    """Another process: pulls each offer that it is sent, slowly."""
    memory = DeviceMemory(LAYOUT, NUM_BLOCKS, CUDA)
    sink = sink_over(memory)
    run = CopyStream.run_parts

    def slowly(self: CopyStream, *args: object) -> None:
        parent.send("copying")
        for _ in range(1_000_000):
            run(self, *args)

    CopyStream.run_parts = slowly
    while True:
        offer, num_tokens = await asyncio.to_thread(parent.recv)
        blocks = range(LAYOUT.num_blocks_for(num_tokens))
        await sink.pull(offer, block_ids=blocks, num_held_tokens=0, deadline=time.monotonic() + 60)


def run_child(role: str, parent: Connection) -> None:
    asyncio.run(serve_source(parent) if role == "source" else serve_sink(parent))


@contextmanager
def process(role: str) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=run_child, args=(role, theirs), daemon=True)
    child.start()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(10)


def receive(connection: Connection) -> object:
    assert connection.poll(60), "the other process says nothing"
    return connection.recv()


def healthy() -> bool:
    """No error sticks to this process's device."""
    ones = torch.ones(256, 256, device=CUDA)
    total = (ones @ ones).sum().item()
    torch.cuda.synchronize()
    return total == 256**3


def kv(memory: DeviceMemory) -> torch.Tensor:
    return memory.kv(torch.bfloat16).view(torch.int16)


async def pull(sink: KvSink, offer: bytes, num_tokens: int, block_size: int = 16) -> object:
    blocks = range(-(-num_tokens // block_size))
    return await sink.pull(offer, block_ids=blocks, num_held_tokens=0, deadline=time.monotonic() + 30)


@pytest.mark.parametrize("block_size", [16, 8, 32])
@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
async def test_another_process_kv_arrives_token_by_token(transport: str, block_size: int) -> None:
    num_tokens = 1000
    expected = random_pool()
    memory = DeviceMemory(replace(LAYOUT, block_size=block_size), 8 * NUM_BLOCKS // block_size, CUDA)
    sink = sink_over(memory, CudaIpcSink(CUDA) if transport == "cuda_ipc" else TcpSink(TOKEN))
    with process("source") as (_, child):
        receive(child)
        for _ in range(2):
            child.send(num_tokens)
            pulled = await pull(sink, receive(child), num_tokens, block_size)
            assert (pulled.first_token, pulled.transport) == (FIRST_TOKEN, transport)
        await sink.close()
        child.send(None)
        assert receive(child) == "bye"
    theirs = kv(expected)[[(5 * i) % NUM_BLOCKS for i in range(LAYOUT.num_blocks_for(num_tokens))]]
    ours = kv(memory)[: -(-num_tokens // block_size)]
    by_token = [part.permute(1, 2, 3, 5, 0, 4).flatten(4)[..., :num_tokens] for part in (theirs, ours)]
    assert torch.equal(*by_token)


async def test_a_source_killed_in_mid_copy_fails_the_pull_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DeviceMemory(LAYOUT, NUM_BLOCKS, CUDA)
    expected = random_pool()
    sink = sink_over(memory)
    copying, killed = Event(), Event()
    run = CopyStream.run_parts

    def until_killed(self: CopyStream, *args: object) -> None:
        copying.set()
        while not killed.is_set():
            run(self, *args)
        for _ in range(100):  # its memory is still there
            run(self, *args)

    monkeypatch.setattr(CopyStream, "run_parts", until_killed)
    with process("source") as (source, child):
        receive(child)
        child.send(16 * NUM_BLOCKS)
        task = asyncio.create_task(pull(sink, receive(child), 16 * NUM_BLOCKS))
        await until(copying.is_set, 30)
        os.kill(source.pid, signal.SIGKILL)
        source.join(10)
        killed.set()
        with pytest.raises(TransferError):
            await task
    assert torch.equal(kv(memory), kv(expected)[[(5 * i) % NUM_BLOCKS for i in range(NUM_BLOCKS)]]), "a torn copy"
    assert healthy()
    monkeypatch.undo()
    with process("source") as (_, child):  # and the next one is pulled from
        receive(child)
        child.send(64)
        assert (await pull(sink, receive(child), 64)).first_token == FIRST_TOKEN
    await sink.close()
    assert healthy()


async def test_a_sink_killed_in_mid_copy_costs_the_source_nothing() -> None:
    memory, released = random_pool(), []
    async with source_over(memory, CudaIpcServer(memory), released) as source:
        with process("sink") as (sink, child):
            child.send((offer_all(source, 4096), 4096))
            await asyncio.to_thread(receive, child)
            os.kill(sink.pid, signal.SIGKILL)
            await until(lambda: len(released) == 1, 40)
        assert healthy()
    memory.close()


def test_memory_of_a_dead_process_stays_readable_until_it_is_closed() -> None:
    expected = random_pool()
    with process("source") as (source, child):
        address, key, size = receive(child)
        reader = CudaIpcSink(CUDA).connect(address, key, size)
        os.kill(source.pid, signal.SIGKILL)
        source.join(10)
        assert not source.is_alive()
    assert torch.equal(reader.memory, expected.tensor)
    started = time.perf_counter()
    reader.close()
    assert time.perf_counter() - started < 1.0
    assert healthy()


def test_two_links_may_map_one_source_and_close_apart() -> None:
    expected = random_pool()
    with process("source") as (_, child):
        address, key, size = receive(child)
        first, second = (CudaIpcSink(CUDA).connect(address, key, size) for _ in range(2))
        first.close()
        assert torch.equal(second.memory, expected.tensor)
        second.close()
    assert healthy()


def test_what_is_not_the_source_memory_is_refused_and_leaves_no_error_behind() -> None:
    with process("source") as (_, child):
        address, key, size = receive(child)
        uuid, offset, proof = address.split(":")
        wrong = [
            (address, bytes(64) + key[64:], size),
            (address, Random(1).randbytes(64) + key[64:], size),
            (address, key[:64] + bytes(64), size),
            (address, key, size << 20),
            (f"{uuid}:{10**14}:{proof}", key, size),
            (f"{uuid}:{offset}:0", key, size),
            (f"{uuid}:{offset}:{10**14}", key, size),
            ("", key, size),
            (address, b"", size),
        ]
        for case in wrong:
            with pytest.raises(TransferError):
                CudaIpcSink(CUDA).connect(*case)
            assert healthy()
        reader = CudaIpcSink(CUDA).connect(address, key, size)
        assert isinstance(reader, CudaIpcReader)
        reader.close()


def test_a_process_does_not_map_its_own_memory() -> None:
    memory = random_pool(num_blocks=2)
    server = CudaIpcServer(memory)
    with pytest.raises(TransferError):
        CudaIpcSink(CUDA).connect(server.address, server.key(b""), memory.size)
    assert healthy()


@pytest.mark.parametrize("transport", ["loopback", "staged", "tcp"])
async def test_every_way_within_one_process(transport: str) -> None:
    async with pair(transport, memories=("cuda", "cuda")) as p:
        for num_tokens in (1, 30, 100):
            lease_id, offer, blocks = p.open(num_tokens)
            p.source.finish(lease_id, FIRST_TOKEN, False)
            await p.pull(offer, num_tokens)
            p.check(blocks, num_tokens)


async def test_from_a_gpu_to_a_host() -> None:
    async with pair("tcp", memories=("cuda", "host")) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 30)
        p.check(blocks, 30)


@pytest.mark.parametrize("unit", [16, 8, 4, 2, 1])
def test_rows_of_any_alignment_are_copied_exactly(unit: int) -> None:
    random, size = Random(unit), 1 << 20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=CUDA)
    sink = torch.zeros(size + unit, dtype=torch.uint8, device=CUDA)[unit:]
    expected, rows, end = sink.clone(), [], 0
    while end < size - (100 << 10):
        count = random.choice([unit, random.randrange(0, 100 << 10) // unit * unit])
        start = random.randrange(0, size - count) // unit * unit
        rows.append((start, end, count))
        expected[end : end + count] = source[start : start + count]
        end += count + random.choice([0, 3]) * unit
    torch.cuda.synchronize()
    CopyStream(CUDA).run(source, sink, np.array(rows), Event())
    assert torch.equal(sink, expected)


def test_more_rows_than_one_launch_takes_and_shifted_parts_are_copied_exactly() -> None:
    count, size = 150_000, 16
    source = torch.randint(0, 256, (count * size,), dtype=torch.uint8, device=CUDA)
    sink = torch.zeros_like(source)
    places = np.random.default_rng(1).permutation(count)
    rows = np.stack([places * size, np.arange(count) * size, np.full(count, size)], axis=1)
    torch.cuda.synchronize()
    stream = CopyStream(CUDA)
    stream.run(source, sink, rows, Event())
    assert torch.equal(sink.view(-1, size), source.view(-1, size)[places])
    sink.zero_()
    torch.cuda.synchronize()
    rows[:, 2] = 0
    table = RowTable(rows[:40_000])
    parts = [Part(table, first, 20_000, (shift, shift, 8)) for first in (20_000, 0) for shift in (0, 8)]
    stream.run_parts(source, sink, parts, Event())
    assert torch.equal(sink.view(-1, size)[:40_000], source.view(-1, size)[places[:40_000]])
    assert not sink[40_000 * size :].any()


def test_a_copy_waits_for_no_other_stream() -> None:
    stream = CopyStream(CUDA)
    source, sink = (
        torch.ones(1 << 20, dtype=torch.uint8, device=CUDA),
        torch.zeros(1 << 20, dtype=torch.uint8, device=CUDA),
    )
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second on the default stream
    busy = torch.cuda.Event()
    busy.record()
    stream.run(source, sink, np.array([(0, 0, 1 << 20)]), Event())
    assert not busy.query(), "the copy came after the default stream's work"
    torch.cuda.synchronize()
    assert sink.all()


def test_a_copy_holds_no_interpreter_lock() -> None:
    """Another thread runs on while a long copy is waited for."""
    stream = CopyStream(CUDA)
    source, sink = (torch.zeros(4 << 30, dtype=torch.uint8, device=CUDA) for _ in range(2))
    torch.cuda.synchronize()
    rows, count, done = np.array([(0, 0, 4 << 30)] * 64), 0, Event()

    def copy() -> None:
        stream.run(source, sink, rows, Event())
        done.set()

    thread = Thread(target=copy)
    thread.start()
    while not done.is_set():
        count += 1
    thread.join()
    assert count > 10_000
