"""A source and a sink in one process, over a real stream on loopback, with block pools that are counted."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import torch

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory
from engine.message_server import MessageServer
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import KvSink, SinkConfig
from kv_transfer.source import KvSource, SourceConfig
from kv_transfer.transports.base import LINK_ID_BYTES, Arrived, Fetch, PieceReader, Run, ServerTransport, SinkTransport
from kv_transfer.transports.loopback import LoopbackServer, LoopbackSink
from kv_transfer.transports.shared_memory import SharedMemoryServer, SharedMemorySink, host_boot_id
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer

LAYOUT = KvLayout(4, 2, 8, 4, "float32")
GROUPS = (1, 4)
NUM_BLOCKS = 64
TOKEN = "a token"
TRANSPORTS = ("loopback", "shared_memory", "tcp")
Memory = HostMemory | DeviceMemory
MEMORIES: dict[str, Callable[[KvLayout, int], Memory]] = {
    "host": HostMemory,
    "device": lambda layout, num_blocks: DeviceMemory(layout, num_blocks, torch.device("cpu"), spare_blocks=1),
    "cuda": lambda layout, num_blocks: DeviceMemory(layout, num_blocks, torch.device("cuda:0"), spare_blocks=1),
}
FIRST_TOKEN = 42


@dataclass
class Pair:
    source: KvSource
    sink: KvSink
    server: MessageServer
    address: str
    source_memory: Memory
    sink_memory: Memory
    released: list[tuple[str, list[int]]] = field(default_factory=list)
    _next_block: int = 0

    def open(self, num_tokens: int, num_final: int = 0, name: str = "r") -> tuple[str, bytes, list[int]]:
        """Offer a prompt in blocks that are not neighbours: (lease id, offer, block ids)."""
        count = self.source_memory.layout.num_blocks_for(num_tokens)
        block_ids = [(self._next_block + 5 * i) % self.source_memory.num_blocks for i in range(count)]
        self._next_block += 1
        opened = self.source.open(name, block_ids, num_tokens, num_final)
        assert opened is not None
        return *opened, block_ids

    def pull(
        self, offer: bytes, num_tokens: int, held: int = 0, timeout: float = 20.0, blocks: Sequence[int] | None = None
    ) -> asyncio.Task:
        block_ids = self.sink_blocks(num_tokens, held) if blocks is None else blocks
        return asyncio.create_task(
            self.sink.pull(offer, block_ids=block_ids, num_held_tokens=held, deadline=time.monotonic() + timeout)
        )

    def sink_blocks(self, num_tokens: int, held: int = 0) -> list[int]:
        layout = self.sink_memory.layout
        count = layout.num_blocks_for(num_tokens) - held // layout.block_size
        return [(7 * i + 3) % self.sink_memory.num_blocks for i in range(count)]

    def check(self, source_blocks: Sequence[int], num_tokens: int, held: int = 0) -> None:
        """Token by token: the sink has what the source has."""
        theirs, ours = tokens(self.source_memory), tokens(self.sink_memory)
        sink_blocks = self.sink_blocks(num_tokens, held)
        for token in range(held, num_tokens):
            block, slot = divmod(token, self.source_memory.layout.block_size)
            sink_block, sink_slot = divmod(token - held, self.sink_memory.layout.block_size)
            expected = theirs[source_blocks[block], :, :, :, slot]
            assert (ours[sink_blocks[sink_block], :, :, :, sink_slot] == expected).all(), token

    async def until_released(self, count: int = 1) -> None:
        await until(lambda: len(self.released) >= count)

    def untouched(self, except_blocks: Sequence[int] = ()) -> bool:
        kv = tokens(self.sink_memory)
        return all((kv[block] == -1).all() for block in range(len(kv)) if block not in except_blocks)


def content(memory: Memory) -> bytes:
    return bytes(memory.buffer if isinstance(memory, HostMemory) else memory.tensor[: memory.size].cpu().numpy())


def fill(memory: Memory, data: bytes) -> None:
    if isinstance(memory, HostMemory):
        memory.buffer[:] = data
    else:
        memory.tensor[: memory.size].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def tokens(memory: Memory) -> np.ndarray:
    """A copy, so that nothing keeps the memory."""
    return np.frombuffer(content(memory), np.int32).reshape(memory.layout.shape(memory.num_blocks))


async def until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in threads of its own
            await asyncio.sleep(0.005)


class FaultyTransport:
    """Wraps a transport; `fault(fetches, number of the call)` runs after each read, or instead when it raises."""

    def __init__(self, inner: SinkTransport, fault: Callable[[Sequence[Fetch], int], None]) -> None:
        self.name = inner.name
        self._inner = inner
        self.fault = fault

    def connect(self, address: str, key: bytes, size: int) -> PieceReader:
        return FaultyReader(self._inner.connect(address, key, size), self.fault)


class FaultyReader:
    def __init__(self, inner: PieceReader, fault: Callable[[Sequence[Fetch], int], None]) -> None:
        self.name = inner.name
        self.batch_bytes = 1
        self._inner = inner
        self._fault = fault
        self._num_calls = 0

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:
        parts: list[memoryview] = []
        self._inner.read(lease_id, fetches, parts.append, stop)
        self._num_calls += 1
        self._fault(fetches, self._num_calls)
        for part in parts:
            arrived(part)

    def close(self) -> None:
        self._inner.close()


class StagedTransport:
    """A StageReader: packs pieces of a memory in this process into the stage. `fault(number of the call)` comes first.

    As a server it is a loopback of another name, whose announcements carry no checksums.
    """

    name = "staged"
    checksums = False
    worthwhile_bytes = 0
    address = ""
    batch_bytes = 3000

    def __init__(self, memory: Memory, fault: Callable[[int], None] = lambda _: None) -> None:
        self._memory = memory
        self.fault = fault
        self.num_calls = 0
        self.num_closed = 0

    def reaches(self, boot_id: str) -> bool:  # noqa: ARG002
        return True

    def start(self, guard: object) -> None:
        self._guard = guard

    def key(self, link_key: bytes) -> bytes:
        return link_key

    def connect(self, address: str, key: bytes, size: int) -> "StagedTransport":  # noqa: ARG002
        self._link_id = key[:LINK_ID_BYTES]
        return self

    def read_into(
        self,
        lease_id: str,
        runs: Sequence[Run],
        sizes: Sequence[int],
        stage: torch.Tensor,
        stop: Event,  # noqa: ARG002
    ) -> None:
        self.num_calls += 1
        self.fault(self.num_calls)
        pieces = [(run.layer_group, run.first_block + i) for run in runs for i in range(run.num_blocks)]
        ranges = self._guard.begin_read(self._link_id, lease_id, pieces)
        if ranges is None:
            raise TransferError("refused", retryable=True)
        pool = content(self._memory)
        packed = b"".join(pool[start : start + size] for start, size in ranges)
        assert [size for _, size in ranges] == [
            size for run, size in zip(runs, sizes, strict=True) for _ in range(run.num_blocks)
        ]
        stage.copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        self._guard.end_read(lease_id)

    def close(self) -> None:
        self.num_closed += 1


class BlockingTransport:
    """Each read waits at a gate, then writes, so that a test can look at a copy in full flight."""

    name = "loopback"

    def __init__(self, inner: SinkTransport) -> None:
        self._inner = inner
        self.entered = Event()
        self.gate = Event()
        self.num_written = 0

    def connect(self, address: str, key: bytes, size: int) -> PieceReader:
        outer = self

        def hold(fetches: Sequence[Fetch], number: int) -> None:  # noqa: ARG001
            outer.entered.set()
            assert outer.gate.wait(10)
            for fetch in fetches:
                fetch.into[:] = bytes(len(fetch.into))
            outer.num_written += 1

        return FaultyReader(self._inner.connect(address, key, size), hold)


def print_of(memory: Memory, model: str = "model") -> str:
    return fingerprint(model, [memory.layout], b"secret")


@asynccontextmanager
async def pair(
    transport: str = "loopback",
    *,
    layout: KvLayout = LAYOUT,
    sink_layout: KvLayout | None = None,
    groups: Sequence[int] = GROUPS,
    source_config: SourceConfig | None = None,
    sink_config: SinkConfig | None = None,
    wrap: Callable[[SinkTransport], SinkTransport] = lambda inner: inner,
    source_model: str = "model",
    sink_token: str = TOKEN,
    link_address: str | None = None,
    memories: tuple[str, str] = ("host", "host"),
) -> AsyncIterator[Pair]:
    source_memory = MEMORIES[memories[0]](layout, NUM_BLOCKS)
    sink_memory = MEMORIES[memories[1]](sink_layout or layout, NUM_BLOCKS)
    size = source_memory.size
    fill(source_memory, np.random.default_rng(1).bytes(size))
    fill(sink_memory, b"\xff" * sink_memory.size)
    registry: dict[str, Memory] = {}
    server = MessageServer("127.0.0.1", token=TOKEN)
    address = server.address
    servers: dict[str, ServerTransport] = {
        "loopback": LoopbackServer(source_memory, registry, "pool"),
        "tcp": TcpServer(source_memory, host="127.0.0.1", token=TOKEN),
    }
    sinks: dict[str, SinkTransport] = {
        "loopback": LoopbackSink(registry),
        "shared_memory": SharedMemorySink(),
        "tcp": TcpSink(TOKEN),
    }
    if isinstance(source_memory, HostMemory):
        servers["shared_memory"] = SharedMemoryServer(source_memory)
    staged = StagedTransport(source_memory)
    servers[staged.name] = sinks[staged.name] = staged
    released: list[tuple[str, list[int]]] = []
    source = KvSource(
        worker_id="prefill-0",
        epoch="1",
        memory=source_memory,
        layer_groups=groups,
        fingerprint=print_of(source_memory, source_model),
        link_address=link_address or address,
        transports=list(servers.values()),
        config=source_config,
        on_released=lambda lease_id, blocks: released.append((lease_id, blocks)),
    )
    source.register(server)
    await server.start()
    names = ["shared_memory", "tcp"] if transport == "auto" else [transport]
    sink = KvSink(
        worker_id="decode-0",
        memory=sink_memory,
        fingerprint=print_of(sink_memory),
        token=sink_token,
        transports=[wrap(sinks[name]) for name in names],
        boot_id=host_boot_id(),
        config=sink_config,
    )
    try:
        yield Pair(source, sink, server, address, source_memory, sink_memory, released)
    finally:
        await sink.close()
        await server.stop()
        await source.close()
        num_released = len(released)
        assert len({lease_id for lease_id, _ in released}) == num_released, "a lease was released twice"
        if isinstance(sink_memory, DeviceMemory):
            assert not sink_memory.tensor[sink_memory.size :].any(), "a spare block was written"
        source_memory.close()
        sink_memory.close()


async def failure(task: asyncio.Task) -> TransferError:
    """The TransferError that the pull must end with."""
    try:
        await task
    except TransferError as error:
        return error
    raise AssertionError("the pull should have failed")
