"""KV in a device's memory: every layout, by every kind of reader, and mixed with host memory. The device is the CPU;
tests/gpu has what only a GPU can show."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from threading import Event

import numpy as np
import pytest
import torch

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from kv_transfer.copy_stream import MAX_ROWS, CopyStream, Part, RowTable, _Slot, packed
from kv_transfer.pull import Pull
from kv_transfer.sink import SinkConfig
from kv_transfer.source import SourceConfig
from kv_transfer.transports import cuda_driver, cuda_ipc
from protos import transfer_pb2 as pb
from tests.kv_transfer.pair import (
    FIRST_TOKEN,
    LAYOUT,
    StagedTransport,
    content,
    failure,
    pair,
    tokens,
    until,
)
from tests.kv_transfer.test_faults import every, flip
from tests.kv_transfer.test_hostile import announcement, layout, liar

CPU = torch.device("cpu")
DEVICES = ("device", "device")
WAYS = [  # transport, memories
    ("loopback", DEVICES),
    ("staged", DEVICES),
    ("tcp", DEVICES),
    ("tcp", ("device", "host")),
    ("tcp", ("host", "device")),
    ("loopback", ("host", "device")),
    ("shared_memory", ("host", "device")),
]
ways = pytest.mark.parametrize(("transport", "memories"), WAYS)


@ways
async def test_every_way_moves_every_token(transport: str, memories: tuple[str, str]) -> None:
    async with pair(transport, memories=memories) as p:
        lease_id, offer, blocks = p.open(30, num_final=2)
        task = p.pull(offer, 30)
        p.source.announce(lease_id, 0, 5)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        pulled = await task
        assert (pulled.first_token, pulled.transport) == (FIRST_TOKEN, transport)
        assert (pulled.num_blocks, pulled.num_bytes) == (8, 8 * LAYOUT.block_bytes)
        p.check(blocks, 30)
        assert p.untouched(p.sink_blocks(30))
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


@ways
async def test_pieces_are_in_place_before_the_next_are_computed(transport: str, memories: tuple[str, str]) -> None:
    async with pair(transport, memories=memories) as p:
        lease_id, offer, blocks = p.open(18)
        task = p.pull(offer, 18)
        first, last = blocks[0], p.sink_blocks(18)[0]
        for group, layers in enumerate((slice(0, 1), slice(1, 4))):
            expected = tokens(p.source_memory)[first, layers]
            p.source.announce(lease_id, group, 2)
            await until(
                lambda layers=layers, expected=expected: (tokens(p.sink_memory)[last, layers] == expected).all()
            )
        assert not task.done()
        p.source.finish(lease_id, FIRST_TOKEN, True)
        assert (await task).finished
        p.check(blocks, 18)


@ways
@pytest.mark.parametrize(("source_size", "sink_size"), [(4, 8), (8, 4), (2, 8), (8, 2)])
async def test_block_sizes_may_differ(
    transport: str, memories: tuple[str, str], source_size: int, sink_size: int
) -> None:
    layouts = replace(LAYOUT, block_size=source_size), replace(LAYOUT, block_size=sink_size)
    async with pair(transport, layout=layouts[0], sink_layout=layouts[1], memories=memories) as p:
        for num_tokens in (1, 9, 31):
            for held in {0, sink_size, 2 * sink_size}:
                if held > num_tokens:
                    continue
                lease_id, offer, blocks = p.open(num_tokens)
                task = p.pull(offer, num_tokens, held)
                p.source.announce(lease_id, 0, num_tokens // source_size)
                p.source.finish(lease_id, FIRST_TOKEN, False)
                await task
                p.check(blocks, num_tokens, held)


@pytest.mark.parametrize("seed", range(24))
async def test_the_device_gets_what_a_host_gets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random splits, block sizes and groups: every byte of the pool as the host's copier leaves it."""
    for module in ("source", "sink"):  # a rank of more than one is not a whole worker
        monkeypatch.setattr(f"kv_transfer.{module}.difference", lambda *_: "")
    random = Random(seed)
    heads, layers, size = random.choice([1, 2, 4]), random.choice([1, 2, 4]), random.choice([2, 4, 8])
    head, layer = random.randrange(4 // heads) * heads, random.randrange(4 // layers) * layers
    source = KvLayout(4, 4, random.choice([2, 3, 8]), 4, "float32")
    sink = KvLayout(layers, heads, source.head_dim, size, "float32", first_layer=layer, first_kv_head=head)
    groups = sorted({random.randint(1, 3), 4})
    num_tokens = random.randint(1, 50)
    held = random.randint(0, num_tokens // size) * size
    transport = random.choice(["loopback", "staged"])
    pools = []
    for way, memories in (("loopback", ("host", "host")), (transport, DEVICES)):
        async with pair(way, layout=source, sink_layout=sink, groups=groups, memories=memories) as p:
            lease_id, offer, _ = p.open(num_tokens)
            task = p.pull(offer, num_tokens, held)
            p.source.announce(lease_id, 0, num_tokens // 4)
            p.source.finish(lease_id, FIRST_TOKEN, False)
            await task
            pools.append(content(p.sink_memory))
    assert pools[0] == pools[1]


async def test_announcements_of_what_no_cpu_touches_are_whole_and_carry_no_checksums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[pb.Announcement] = []
    hear = Pull.announced

    def listen(self: Pull, message: pb.Announcement) -> None:
        heard.append(message)
        hear(self, message)

    monkeypatch.setattr(Pull, "announced", listen)
    config = SourceConfig(announce_bytes=LAYOUT.layer_bytes)
    for transport, announced in (("loopback", [[(8, 0)] * 2]), ("tcp", [[(1, 1)]] * 16)):
        heard.clear()
        async with pair(transport, memories=DEVICES, source_config=config) as p:
            lease_id, offer, _ = p.open(30)
            p.source.finish(lease_id, FIRST_TOKEN, False)
            await p.pull(offer, 30)
        said = [[(pieces.num_blocks, len(pieces.checksums)) for pieces in message.pieces] for message in heard]
        assert said == announced


async def test_what_was_announced_together_and_lies_together_is_copied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, copied = CopyStream._submit, []

    def note(self: CopyStream, *args: object) -> None:
        copied.extend((args[-1].rows + args[-1].shift)[:, 2].tolist())
        submit(self, *args)

    monkeypatch.setattr(CopyStream, "_submit", note)
    async with pair("loopback", memories=DEVICES, groups=(1, 2, 4)) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.announce(lease_id, 1, 3)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 30)
        p.check(blocks, 30)
        assert copied == [LAYOUT.block_bytes] * 8
    copied.clear()
    async with pair("loopback", memories=DEVICES, groups=(1, 2, 4), sink_layout=replace(LAYOUT, block_size=8)) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 30)
        p.check(blocks, 30)
        assert sum(copied) == 8 * LAYOUT.block_bytes
        assert len(copied) > 8


async def test_what_comes_through_the_cpu_is_verified_before_it_reaches_the_device() -> None:
    config = SinkConfig(copy_threads=1)
    async with pair("tcp", memories=DEVICES, wrap=every(3, flip), sink_config=config) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 30)
        p.check(blocks, 30)
    async with pair("tcp", memories=DEVICES, wrap=every(1, flip)) as p:
        lease_id, offer, _ = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert "checksum mismatch" in str(await failure(p.pull(offer, 30)))
        assert p.untouched()


async def test_a_stage_that_could_not_be_filled_is_filled_again() -> None:
    def break_off(number: int) -> None:
        if number in (1, 3):
            raise TransferError("connection reset", retryable=True)

    async with pair("staged", memories=DEVICES, sink_config=SinkConfig(copy_threads=1, stage_bytes=2000)) as p:
        (transport,) = (each for each in p.sink._greeting.transports if isinstance(each, StagedTransport))
        transport.fault = break_off
        lease_id, offer, blocks = p.open(10)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 10)
        p.check(blocks, 10)
        assert transport.num_calls > 2
    assert transport.num_closed == 2, "one end is the sink's, one the source's"


async def test_pieces_larger_than_a_stage_are_refused() -> None:
    async with pair("staged", memories=DEVICES, sink_config=SinkConfig(stage_bytes=LAYOUT.layer_bytes)) as p:
        _, offer, _ = p.open(10)
        assert "larger than" in str(await failure(p.pull(offer, 10)))


async def test_without_memory_for_stages_another_transport_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, stage_bytes: int, **__: object) -> None:
        if stage_bytes:
            raise torch.OutOfMemoryError("none")

    monkeypatch.setattr("kv_transfer.device_copier.CopyStream", full)
    async with pair("staged", memories=DEVICES) as p:
        _, offer, _ = p.open(10)
        assert "no memory" in str(await failure(p.pull(offer, 10)))


async def test_a_mapped_source_cannot_fill_host_memory() -> None:
    async with pair("loopback", memories=("device", "host")) as p:
        _, offer, _ = p.open(10)
        assert "cannot fill host memory" in str(await failure(p.pull(offer, 10)))


async def test_a_lease_that_ends_during_a_copy_fails_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = Event(), Event()
    run = CopyStream.run_parts

    def hold(self: CopyStream, *args: object) -> None:
        entered.set()
        assert gate.wait(10)
        run(self, *args)

    monkeypatch.setattr(CopyStream, "run_parts", hold)
    async with pair(memories=DEVICES) as p:
        lease_id, offer, _ = p.open(8)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        task = p.pull(offer, 8)
        await until(entered.is_set)
        p.source.abort(lease_id, "enough")
        await asyncio.wait([task], timeout=0.2)
        assert not task.done(), "the blocks are written to"
        gate.set()
        assert "enough" in str(await failure(task))
        await p.until_released()


@pytest.mark.parametrize(
    "answers",
    [
        [announcement(2, 0, 1, num_checksums=0)],
        [announcement(0, 1, 1, num_checksums=0)],
        [announcement(0, 0, 3, num_checksums=0)],
        [announcement(0, 0, 2**32 - 1, num_checksums=0)],
        [announcement(0, 2**32 - 1, 2, num_checksums=0)],
        [announcement(0, 0, 1, num_checksums=0), announcement(0, 0, 1, num_checksums=0)],
        [announcement(0, 0, 2, last=True, num_checksums=0)],
        [announcement(0, 0, 2)],
        [announcement(0, 0, 0, num_checksums=2)],
    ],
)
async def test_announcements_out_of_bounds_fail_the_pull_on_a_device_too(answers: list) -> None:
    async with pair(memories=DEVICES) as p, liar(p, answers) as offer:
        assert (await failure(p.pull(offer, 8, timeout=5.0))).retryable
        assert p.untouched(except_blocks=p.sink_blocks(8))


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_host_does_without_no_checksum(count: int) -> None:
    async with pair() as p, liar(p, [announcement(0, 0, 2, num_checksums=count)]) as offer:
        assert "number of checksums" in str(await failure(p.pull(offer, 8, timeout=5.0)))
        assert p.untouched()


@pytest.mark.parametrize("greeting", [{"num_blocks": 2**32 - 1}, layout(num_layers=3), layout(head_dim=2**31)])
async def test_a_greeting_that_lies_about_sizes_copies_nothing(greeting: dict) -> None:
    async with pair(memories=DEVICES) as p, liar(p, [announcement(0, 0, 2, num_checksums=0)], **greeting) as offer:
        await failure(p.pull(offer, 8, timeout=5.0))
        assert p.untouched()


# The parts.


def test_rows_that_reach_outside_are_never_copied() -> None:
    stream = CopyStream(CPU)
    source, sink = torch.arange(64, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    for row in [(-1, 0, 4), (0, -1, 4), (0, 0, -1), (61, 0, 4), (0, 29, 4), (0, 0, 33)]:
        with pytest.raises(AssertionError):
            stream.run(source, sink, np.array([(0, 0, 1), row]), Event())
    assert not sink.any()
    stream.run(source, sink, np.array([(60, 28, 4)]), Event())
    assert sink.tolist() == [0] * 28 + [60, 61, 62, 63]


def test_parts_of_a_table_are_copied_with_their_shifts_and_never_outside() -> None:
    random = np.random.default_rng(1)
    source = torch.from_numpy(random.integers(0, 256, 640, np.uint8))
    rows = np.stack([random.permutation(20) * 32, np.arange(20) * 32, np.zeros(20, np.int64)], axis=1)
    table, stream = RowTable(rows), CopyStream(CPU)
    sink, expected = torch.zeros(640, dtype=torch.uint8), torch.zeros(640, dtype=torch.uint8)
    parts = [Part(table, 3, 5, (8, 16, 4)), Part(table, 7, 13, (0, 0, 8)), Part(table, 0, 0, (0, 0, 8))]
    for part in parts:
        for start, end, _ in rows[part.first : part.first + part.count].tolist():
            from_, to, size = start + part.shift[0], end + part.shift[1], part.shift[2]
            expected[to : to + size] = source[from_ : from_ + size]
    stream.run_parts(source, sink, parts, Event())
    assert torch.equal(sink, expected)
    for first, count, shift in [(0, 21, (0, 0, 8)), (-1, 2, (0, 0, 8)), (0, 1, (0, 0, 33)), (0, 1, (-8, 0, 8))]:
        with pytest.raises(AssertionError):
            stream.run_parts(source, sink, [Part(table, first, count, shift)], Event())
    assert torch.equal(sink, expected)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_kernel_moves_at_once_divides_everything(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        unit = random.choice([1, 2, 4, 8, 16, 32])
        rows = np.array([[random.randrange(100) * unit for _ in range(3)] for _ in range(3)])
        shift, addresses = ([random.randrange(100) * unit for _ in range(n)] for n in (3, 2))
        found = Part(RowTable(rows), 0, 3, tuple(shift)).unit(*addresses)
        assert found in (1, 2, 4, 8, 16)
        assert not (rows + shift).ravel().any() or not ((rows + shift) % found).any()
        assert not any(address % found for address in addresses)
        assert found >= min(unit, 16), "no smaller than it need be"


def test_rows_in_pinned_memory_are_not_overwritten_before_they_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, waits = _Slot.finish, []
    monkeypatch.setattr(_Slot, "finish", lambda slot: (waits.append(True), finish(slot)))
    slot = _Slot(CPU, None)
    assert [slot.take(MAX_ROWS - 10), slot.take(4), slot.take(6)] == [0, MAX_ROWS - 10, MAX_ROWS - 6]
    assert not waits
    assert slot.take(1) == 0
    assert waits == [True]


def test_ranges_are_packed_without_gaps() -> None:
    source, stage = torch.arange(64, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    CopyStream(CPU).run(source, stage, packed([(60, 3), (5, 1), (9, 4)]), Event())
    assert stage.tolist() == [60, 61, 62, 5, 9, 10, 11, 12]
    assert packed([]).shape == (0, 3)


def test_after_a_stop_nothing_is_copied() -> None:
    stop, sink = Event(), torch.zeros(4, dtype=torch.uint8)
    stop.set()
    with pytest.raises(TransferError, match="stopped"):
        CopyStream(CPU).run(torch.ones(4, dtype=torch.uint8), sink, np.array([(0, 0, 4)]), stop)
    assert not sink.any()


def test_what_was_submitted_is_waited_for_also_when_more_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def broken(*_: object) -> None:
        raise RuntimeError("no more")

    stream = CopyStream(CPU)
    monkeypatch.setattr(CopyStream, "_submit", broken)
    monkeypatch.setattr("kv_transfer.copy_stream._Slot.finish", lambda _: waited.append(True))
    data = torch.zeros(4, dtype=torch.uint8)
    for _ in range(3):  # and its slot is there for the next one
        with pytest.raises(RuntimeError):
            stream.run(data, data, np.array([(0, 0, 4)]), Event())
    assert waited == [True] * 3


class Driver:
    """Stands for the CUDA driver: hands out one mapping at a time. `failing` names the calls that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
        self.failing = failing
        self.num_mapped = 0
        for name in ("context", "open_mapping", "allocation", "close_mapping"):
            monkeypatch.setattr(cuda_driver, name, getattr(self, name))

    def check(self, name: str) -> None:
        if name in self.failing:
            raise cuda_driver.CudaError(name)

    @contextmanager
    def context(self, _: int) -> Iterator[None]:
        yield

    def open_mapping(self, _: bytes) -> int:
        self.check("open_mapping")
        self.num_mapped += 1
        return 1 << 20

    def allocation(self, address: int) -> tuple[int, int]:
        self.check("allocation")
        return address, 4096

    def close_mapping(self, _: int) -> None:
        self.num_mapped -= 1
        self.check("close_mapping")


@pytest.mark.parametrize("failing", ["open_mapping", "allocation", "prove"])
def test_memory_that_cannot_be_used_is_mapped_no_longer(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails is a TransferError: another transport may work."""
    driver = Driver(monkeypatch, failing)

    def unreadable(*_: object) -> None:
        raise RuntimeError("torch cannot read it")

    monkeypatch.setattr(cuda_ipc.CudaIpcReader, "prove", unreadable)
    with pytest.raises(TransferError):
        cuda_ipc.CudaIpcSink(torch.device("cuda:0")).connect("uuid:0:1024", bytes(128), 1024)
    assert driver.num_mapped == 0


def test_a_mapping_that_cannot_be_closed_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Driver(monkeypatch, "close_mapping")
    cuda_ipc.CudaIpcReader(0, bytes(64), 0, 1024).close()
    assert "closing the mapping" in caplog.text


def test_stages_are_lent_to_one_caller_at_a_time() -> None:
    stream = CopyStream(CPU, num_slots=2, stage_bytes=16)
    with stream.stage() as first, stream.stage() as second, stream.pinned() as host:
        assert first.data_ptr() != second.data_ptr()
        assert len(first) == len(second) == len(host) == 16
    with stream.stage() as again:
        assert again.data_ptr() in (first.data_ptr(), second.data_ptr())


@pytest.mark.parametrize("spare", [0, 1])
def test_spare_blocks_are_no_part_of_the_pool(spare: int) -> None:
    memory = DeviceMemory(LAYOUT, 3, CPU, spare_blocks=spare)
    assert (memory.num_blocks, memory.size) == (3, 3 * LAYOUT.block_bytes)
    assert memory.kv(torch.float32).shape == LAYOUT.shape(3 + spare)
    assert not memory.tensor.any()
    memory.kv(torch.float32)[2] = 1.0
    assert memory.tensor.view(torch.float32).sum() == LAYOUT.block_bytes // 4
    memory.proof.fill_(1)
    assert memory.tensor.view(torch.float32).sum() == LAYOUT.block_bytes // 4
    memory.close()
    assert len(memory.tensor) == 0


def test_without_a_driver_there_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(cuda_driver.CudaError), cuda_driver.context(0):
        pass


async def test_a_part_of_a_prompt_is_announced_once_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagedTransport, "worthwhile_bytes", 2 * LAYOUT.block_bytes)
    async with pair("staged", memories=("device", "device")) as p:
        lease_id, offer, blocks = p.open(18)
        task = p.pull(offer, 18)
        others = range(40, 41)
        other_id, other, _ = p.open(3, name="other")
        for group in range(2):
            p.source.announce(lease_id, group, 1)
        p.source.finish(other_id, FIRST_TOKEN, False)
        await p.pull(other, 3, blocks=others)  # the same link, so what was announced before has arrived before
        assert p.untouched(except_blocks=others)
        for group in range(2):
            p.source.announce(lease_id, group, 2)
        await until(lambda: not p.untouched(except_blocks=others))
        assert not task.done()
        p.source.finish(lease_id, FIRST_TOKEN, True)
        await task
        p.check(blocks, 18)


async def test_the_last_group_travels_alone_and_does_not_wait_for_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagedTransport, "worthwhile_bytes", 1 << 30)
    async with pair("staged", memories=("device", "device")) as p:
        lease_id, offer, blocks = p.open(18)
        task = p.pull(offer, 18)
        last = tokens(p.sink_memory)[:, 1:]  # as it is before
        p.source.announce(lease_id, 0, LAYOUT.num_blocks_for(18))
        await until(lambda: not p.untouched())
        assert (tokens(p.sink_memory)[:, 1:] == last).all()
        p.source.announce(lease_id, 1, LAYOUT.num_blocks_for(18))
        await until(lambda: not (tokens(p.sink_memory)[:, 1:] == last).all())
        p.source.finish(lease_id, FIRST_TOKEN, True)
        await task
        p.check(blocks, 18)
