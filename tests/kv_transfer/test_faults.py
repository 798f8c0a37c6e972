"""What goes wrong on the way: bytes, sources, sinks and clocks. Blocks come back exactly once on both sides."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from threading import Event, Thread, current_thread
from typing import Any

import numpy as np
import pytest

from engine.errors import TransferError
from kv_transfer.checksum import HostChecksums, checksum
from kv_transfer.pull import Pull
from kv_transfer.sink import SinkConfig
from kv_transfer.source import SourceConfig
from kv_transfer.transports.base import Fetch, PieceReader, SinkTransport
from tests.kv_transfer.pair import (
    FIRST_TOKEN,
    LAYOUT,
    NUM_BLOCKS,
    TRANSPORTS,
    BlockingTransport,
    FaultyTransport,
    failure,
    fill,
    pair,
    until,
)


def flip(fetches: Sequence[Fetch], number: int) -> None:
    into = fetches[0].into
    into[Random(number).randrange(len(into))] ^= 1 << Random(number).randrange(8)


def zero_the_end(fetches: Sequence[Fetch], number: int) -> None:  # noqa: ARG001
    fetches[-1].into[-100:] = bytes(100)


def break_off(fetches: Sequence[Fetch], number: int) -> None:  # noqa: ARG001
    fetches[-1].into[10:] = bytes(len(fetches[-1].into) - 10)
    raise TransferError("connection reset", retryable=True)


def swapped_with_the_next_block(fetches: Sequence[Fetch], number: int) -> None:
    """What a mix-up of blocks delivers: right bytes of the wrong place."""
    fetches[0].into[:] = np.random.default_rng(number).bytes(len(fetches[0].into))


FAULTS = [flip, zero_the_end, break_off, swapped_with_the_next_block]


def every(nth: int, fault: Callable[[Sequence[Fetch], int], None]) -> Callable[[SinkTransport], SinkTransport]:
    def maybe(fetches: Sequence[Fetch], number: int) -> None:
        if number % nth == 0:
            fault(fetches, number)

    return lambda inner: FaultyTransport(inner, maybe)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_damaged_piece_is_pulled_again(transport: str, fault: Callable) -> None:
    config = SinkConfig(copy_threads=1)
    async with pair(transport, wrap=every(3, fault), sink_config=config) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        pulled = await p.pull(offer, 30)
        assert pulled.num_bytes == 8 * LAYOUT.block_bytes
        p.check(blocks, 30)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_piece_that_never_arrives_right_fails_the_pull_and_another_attempt_may_succeed(fault: Callable) -> None:
    async with pair(wrap=every(1, fault)) as p:
        lease_id, offer, blocks = p.open(30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await failure(p.pull(offer, 30))).retryable
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


async def test_two_swapped_pieces_are_noticed() -> None:
    async with pair() as p:
        lease_id, offer, _ = p.open(8)
        cut = p.source._cut

        def swapped(held: Any) -> Any:  # the sums of the two blocks change places
            work = cut(held)
            return work and replace(work, spans=[replace(s, block_ids=s.block_ids[::-1]) for s in work.spans])

        p.source._cut = swapped
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert "checksum" in str(await failure(p.pull(offer, 8)))


async def test_ten_thousand_flips_are_all_noticed() -> None:
    random = Random(3)
    data = bytearray(random.randbytes(4096))
    good = checksum(memoryview(data))
    for _ in range(10_000):
        at, bit = random.randrange(len(data)), 1 << random.randrange(8)
        data[at] ^= bit
        assert checksum(memoryview(data)) != good
        data[at] ^= bit


async def test_blocks_that_change_after_they_were_announced_are_noticed() -> None:
    transport = None

    def gate(inner: SinkTransport) -> SinkTransport:
        nonlocal transport
        transport = BlockingTransport(inner)
        return transport

    async with pair(wrap=gate) as p:
        lease_id, offer, _ = p.open(4)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        task = p.pull(offer, 4)
        await until(lambda: transport.entered.is_set())
        transport.gate.set()  # writes zeros over what was read
        assert "checksum" in str(await failure(task))


# The source dies.


async def test_a_source_that_is_not_there_fails_the_pull() -> None:
    async with pair(sink_config=SinkConfig(connect_s=2.0)) as p:
        _, offer, _ = p.open(8)
        await p.server.stop()
        assert (await failure(p.pull(offer, 8))).retryable
        assert p.untouched()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_final", [0, 1, 3])
async def test_a_source_that_dies_while_it_announces_fails_the_pull(transport: str, num_final: int) -> None:
    async with pair(transport) as p:
        lease_id, offer, blocks = p.open(30, num_final)
        task = p.pull(offer, 30)
        await until(lambda: p.source._held[lease_id].link is not None)
        await p.server.stop()
        assert (await failure(task)).retryable
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_pull_whose_checksums_were_right_waits_for_nobody(transport: str) -> None:
    async with pair(transport) as p:
        lease_id, offer, blocks = p.open(8)
        p.source.close_lease = lambda *_: None
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await p.pull(offer, 8)).first_token == FIRST_TOKEN
        p.check(blocks, 8)


async def test_a_lease_that_ends_while_its_checksums_are_made_announces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are another prompt's by then, and the sums may be of those."""
    heard: list[object] = []
    monkeypatch.setattr(Pull, "announced", lambda _, message: heard.append(message))
    async with pair("shared_memory", groups=(4,)) as p:
        lease_id, offer, blocks = p.open(8)
        sums_of = HostChecksums.of

        def late(self: HostChecksums, *span: Any) -> list[int]:
            p.source.abort(lease_id, "gone")
            fill(p.source_memory, bytes(p.source_memory.size))
            return sums_of(self, *span)

        monkeypatch.setattr(HostChecksums, "of", late)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert "gone" in str(await failure(p.pull(offer, 8)))
        assert not heard
        assert p.released == [(lease_id, blocks)]


async def test_a_source_that_dies_before_it_confirms_fails_the_pull() -> None:
    async with pair(memories=("device", "device")) as p:
        lease_id, offer, _ = p.open(8)
        p.source.close_lease = lambda *_: None
        p.source.finish(lease_id, FIRST_TOKEN, False)
        task = p.pull(offer, 8)
        await until(lambda: not p.untouched())
        await p.server.stop()
        assert (await failure(task)).retryable
        await p.until_released()


async def test_a_source_that_never_confirms_fails_the_pull_by_deadline() -> None:
    async with pair(memories=("device", "device"), sink_config=SinkConfig(ack_s=0.1)) as p:
        lease_id, offer, _ = p.open(8)
        p.source.close_lease = lambda *_: None
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert "confirmation" in str(await failure(p.pull(offer, 8)))


async def test_a_source_that_falls_silent_fails_its_pulls_by_deadline() -> None:
    config, silent = SinkConfig(silence_s=0.3), SourceConfig(heartbeat_s=1000.0)
    async with pair(source_config=silent, sink_config=config) as p:
        _, offer, _ = p.open(8)
        started = time.monotonic()
        assert "silent" in str(await failure(p.pull(offer, 8)))
        assert time.monotonic() - started < 2.0
        await p.until_released()


async def test_heartbeats_keep_a_link_alive_while_nothing_is_announced() -> None:
    config, source = SinkConfig(silence_s=0.3), SourceConfig(heartbeat_s=0.05)
    async with pair(source_config=source, sink_config=config) as p:
        lease_id, offer, blocks = p.open(8)
        task = p.pull(offer, 8)
        await asyncio.wait([task], timeout=0.7)
        assert not task.done()
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await task
        p.check(blocks, 8)


async def test_a_new_link_replaces_a_dead_one() -> None:
    async with pair() as p:
        lease_id, offer, _ = p.open(8)
        task = p.pull(offer, 8)
        await until(lambda: p.source._held[lease_id].link is not None)
        for link in list(p.source._links.values()):
            link.end()
        await failure(task)
        lease_id, offer, blocks = p.open(8)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 8)
        p.check(blocks, 8)
        await p.until_released(2)


async def test_a_link_that_nobody_needs_is_dropped_and_made_again() -> None:
    async with pair("tcp", source_config=SourceConfig(lease_s=0.3), sink_config=SinkConfig(idle_s=0.05)) as p:
        for number in range(2):
            lease_id, offer, blocks = p.open(8)
            p.source.finish(lease_id, FIRST_TOKEN, False)
            await p.pull(offer, 8)
            p.check(blocks, 8)
            await p.until_released(number + 1)
            await until(lambda: not p.source._links)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_links_that_die_leave_no_file_open(transport: str) -> None:
    async with pair(transport) as p:
        counts = []
        for number in range(6):
            lease_id, offer, _ = p.open(8, 1)
            task = p.pull(offer, 8)
            await until(lambda lease_id=lease_id: p.source._held[lease_id].link is not None)
            for link in list(p.source._links.values()):
                link.end()
            await failure(task)
            await p.until_released(number + 1)
            await until(lambda: not p.source._links)
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[-1] <= counts[0] + 3, counts  # six links would be a dozen files


async def test_a_prefill_that_is_aborted_tells_the_sink_at_once() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(8, 1)
        task = p.pull(offer, 8)
        await until(lambda: p.source._held[lease_id].link is not None)
        started = time.monotonic()
        p.source.abort(lease_id, "cancelled by the client")
        assert p.released == [(lease_id, blocks)]
        assert "cancelled by the client" in str(await failure(task))
        assert time.monotonic() - started < 0.5
        p.source.announce(lease_id, 0, 2)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert len(p.released) == 1


async def test_a_source_that_was_restarted_is_not_the_one_that_made_the_offer() -> None:
    async with pair() as p:
        _, offer, _ = p.open(8)
        p.source._epoch = "2"
        assert "restarted" in str(await failure(p.pull(offer, 8)))


# The sink dies.


async def test_a_cancelled_pull_gives_the_source_its_blocks_back() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(30, 3)
        task = p.pull(offer, 30)
        await until(lambda: not p.untouched())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


async def test_a_pull_cancelled_while_it_connects_leaves_nothing_behind() -> None:
    async with pair() as p:
        lease_id, offer, _ = p.open(8)
        task = p.pull(offer, 8)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert p.untouched()
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 8)  # the offer stands


@pytest.mark.parametrize("num_cancels", [1, 3])
async def test_nothing_is_written_after_a_cancelled_pull_has_returned(num_cancels: int) -> None:
    gates = []

    def gate(inner: SinkTransport) -> SinkTransport:
        gates.append(BlockingTransport(inner))
        return gates[-1]

    async with pair(wrap=gate) as p:
        lease_id, offer, _ = p.open(30, 7)
        task = p.pull(offer, 30)
        (transport,) = gates
        await until(transport.entered.is_set)
        for _ in range(num_cancels):
            task.cancel()
            await asyncio.wait([task], timeout=0.05)
            assert not task.done(), "a copy still runs into its blocks"
        transport.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        written, before = transport.num_written, bytes(p.sink_memory.buffer)
        assert written <= 2, "copies that had not begun never begin"
        await p.until_released()
        assert p.released[0][0] == lease_id
        assert (transport.num_written, bytes(p.sink_memory.buffer)) == (written, before)


async def test_a_sink_that_vanishes_gives_the_source_its_blocks_back() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(30, 3)
        task = p.pull(offer, 30)
        await until(lambda: p.source._held[lease_id].link is not None)
        for link in p.sink._links.values():
            link.result()._messages.abort()
        assert (await failure(task)).retryable
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


async def test_a_stopping_sink_ends_its_pulls() -> None:
    async with pair() as p:
        lease_id, offer, _ = p.open(30, 3)
        task = p.pull(offer, 30)
        await until(lambda: p.source._held[lease_id].link is not None)
        await p.sink.close()
        assert (await failure(task)).retryable
        await p.until_released()


async def test_a_stopping_sink_waits_for_copies_that_run() -> None:
    """Whoever has closed it may give the memory back."""
    gates = []

    def gate(inner: SinkTransport) -> SinkTransport:
        gates.append(BlockingTransport(inner))
        return gates[-1]

    async with pair(wrap=gate) as p:
        lease_id, offer, _ = p.open(30, 7)
        task = p.pull(offer, 30)
        (transport,) = gates
        await until(transport.entered.is_set)
        closing = asyncio.create_task(p.sink.close())
        await p.until_released()
        await asyncio.wait([closing], timeout=0.05)
        assert not closing.done(), "a copy still runs"
        transport.gate.set()
        await closing
        written = transport.num_written
        assert task.done()
        assert "closed" in str(await failure(task))
        assert transport.num_written == written
        assert [lease for lease, _ in p.released] == [lease_id]


class LateTransport:
    """Connects when the gate opens."""

    name = "loopback"

    def __init__(self, inner: SinkTransport) -> None:
        self._inner = inner
        self.gate = Event()
        self.closed_by: list[Thread] = []

    def connect(self, address: str, key: bytes, size: int) -> PieceReader:
        assert self.gate.wait(10)
        reader = self._inner.connect(address, key, size)
        reader.close = lambda: self.closed_by.append(current_thread())
        return reader


async def test_a_reader_that_comes_too_late_is_closed_and_nobody_waits_for_that() -> None:
    """To close one may take a second (NCCL), or as long as the device is busy (CUDA IPC)."""
    late = []

    def wrap(inner: SinkTransport) -> SinkTransport:
        late.append(LateTransport(inner))
        return late[-1]

    async with pair(wrap=wrap, sink_config=SinkConfig(connect_s=0.1)) as p:
        _, offer, _ = p.open(8)
        assert "in time" in str(await failure(p.pull(offer, 8)))
        (transport,) = late
        transport.gate.set()
        await until(lambda: len(transport.closed_by) == 1)
        assert transport.closed_by[0] is not current_thread()


async def test_the_deadline_of_a_pull_ends_it() -> None:
    async with pair() as p:
        _, offer, _ = p.open(30, 3)
        assert "deadline" in str(await failure(p.pull(offer, 30, timeout=0.3)))
        await p.until_released()


# Time.


async def test_an_offer_that_nobody_takes_expires() -> None:
    async with pair(source_config=SourceConfig(lease_s=0.1)) as p:
        lease_id, offer, blocks = p.open(8)
        await p.until_released()
        assert p.released == [(lease_id, blocks)]
        assert "no such lease" in str(await failure(p.pull(offer, 8)))


async def test_the_leases_of_running_pulls_are_renewed() -> None:
    async with pair(source_config=SourceConfig(lease_s=0.3)) as p:
        lease_id, offer, blocks = p.open(8, 1)
        task = p.pull(offer, 8)
        await asyncio.wait([task], timeout=0.9)
        assert not p.released
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await task
        p.check(blocks, 8)


async def test_a_lease_that_ended_before_the_bytes_were_confirmed_fails_the_pull() -> None:
    async with pair(memories=("device", "device")) as p:
        lease_id, offer, _ = p.open(8)
        close = p.source.close_lease

        def late(link, closed_id, pulled):
            p.source._leases._leases[closed_id].expires = 0.0
            close(link, closed_id, pulled)

        p.source.close_lease = late
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await failure(p.pull(offer, 8))).retryable
        assert len(p.released) == 1


async def test_blocks_under_a_read_outlive_their_lease() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(8, 1)
        task = p.pull(offer, 8)
        await until(lambda: p.source._held[lease_id].link is not None)
        link_id = p.source._held[lease_id].link.id
        assert p.source.begin_read(link_id, lease_id, [(0, 0), (1, 0)]) is not None
        p.source.abort(lease_id, "gone")
        assert p.source.begin_read(link_id, lease_id, [(0, 0)]) is None
        await failure(task)
        assert p.released == []
        p.source.end_read(lease_id)
        assert p.released == [(lease_id, blocks)]


async def test_random_aborts_never_hand_over_foreign_blocks_or_lose_one() -> None:
    """Two hundred pulls, a third of them broken on either side at a random moment; blocks are rewritten when freed."""
    random = Random(11)
    async with pair("tcp") as p:
        size = LAYOUT.block_bytes

        async def one(number: int) -> bool:
            block, sink_block = number % NUM_BLOCKS, (number * 7) % NUM_BLOCKS
            p.source_memory.block(block)[:] = bytes([number % 251]) * size
            lease_id, offer = p.source.open(f"r{number}", [block], 4)
            task = p.pull(offer, 4, blocks=[sink_block])
            action = random.choice(["finish", "finish", "cancel", "abort"])
            for _ in range(random.randrange(12)):
                await asyncio.sleep(0)
            if action == "cancel":
                task.cancel()
            elif action == "abort":
                p.source.abort(lease_id, "test")
            else:
                p.source.finish(lease_id, FIRST_TOKEN, False)
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            await _end(p, lease_id, action)
            if isinstance(result, BaseException):
                assert isinstance(result, TransferError | asyncio.CancelledError), result
                return False
            assert bytes(p.sink_memory.block(sink_block)) == bytes([number % 251]) * size
            return True

        outcomes = []
        for start in range(0, 200, 8):
            outcomes += await asyncio.gather(*(one(number) for number in range(start, start + 8)))
        assert 50 < sum(outcomes) < 150
        assert len(p.released) == 200
        assert len(p.source._leases) == 0


async def _end(p, lease_id: str, action: str) -> None:
    if action == "cancel":  # cancelled before it had opened the lease: the router cancels the prefill as well
        p.source.abort(lease_id, "test")
    await until(lambda: any(released == lease_id for released, _ in p.released))
