"""The control protocol of NCCL, with communicators that need no GPU."""

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch

from engine.auth import challenge_response
from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from kv_transfer.transports import nccl_wire as wire
from kv_transfer.transports import tcp_wire
from kv_transfer.transports.base import LINK_ID_BYTES, LINK_KEY_BYTES, Run
from kv_transfer.transports.listener import dial, parse_address
from kv_transfer.transports.nccl import NcclConfig, NcclReader, NcclSink
from kv_transfer.transports.nccl_communicator import Joiner
from kv_transfer.transports.nccl_lane import STOP_S
from kv_transfer.transports.nccl_server import NcclServer, cut
from tests.gpu import nccl_peer
from tests.kv_transfer.fake_nccl import FakeCommunicator, FakeNccl, FakeOperation

CPU = torch.device("cpu")
LAYOUT = KvLayout(4, 2, 8, 4, "float32")
GROUPS = (range(0, 1), range(1, 4))
NUM_BLOCKS = 32
TOKEN = "a token"
LEASE = "a lease"
CONFIG = NcclConfig(join_s=1.0, transfer_s=1.0, chunk_bytes=1000, num_stages=4, max_communicators=8)
SOON = 4.0  # seconds, beyond every deadline of CONFIG together


class Guard:
    """A source whose every block is final while the lease lives; block i of the lease is block 3 * i of the pool."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.leases = {LEASE}
        self.num_reading = 0
        self.num_reads = 0
        self.gate = Event()
        self.gate.set()
        self._lock = threading.Lock()

    def new_link(self) -> bytes:
        key = os.urandom(LINK_KEY_BYTES)
        self.keys[key[:LINK_ID_BYTES]] = key
        return key

    def link_key(self, link_id: bytes) -> bytes | None:
        return self.keys.get(bytes(link_id))

    def begin_read(
        self, link_id: bytes, lease_id: str, pieces: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        assert link_id in self.keys
        assert self.gate.wait(20)
        if lease_id not in self.leases or any(g >= len(GROUPS) or 3 * b >= NUM_BLOCKS for g, b in pieces):
            return None
        with self._lock:
            self.num_reading += 1
            self.num_reads += 1
        return [piece_range(group, block) for group, block in pieces]

    def end_read(self, lease_id: str) -> None:  # noqa: ARG002
        with self._lock:
            self.num_reading -= 1


def piece_range(group: int, block: int) -> tuple[int, int]:
    layers = GROUPS[group]
    start = 3 * block * LAYOUT.block_bytes + layers.start * LAYOUT.layer_bytes
    return start, len(layers) * LAYOUT.layer_bytes


class World:
    """A source; sinks are made by `connect`."""

    def __init__(self, config: NcclConfig = CONFIG) -> None:
        self.config = config
        self.nccl = FakeNccl()
        self.guard = Guard()
        self.memory = DeviceMemory(LAYOUT, NUM_BLOCKS, CPU)
        self.memory.tensor.random_(0, 256, generator=torch.Generator().manual_seed(1))
        self.server = NcclServer(self.memory, host="127.0.0.1", token=TOKEN, config=config, nccl=self.nccl)
        self.server.start(self.guard)
        self.readers: list[NcclReader] = []

    def connect(self, key: bytes | None = None, token: str = TOKEN) -> NcclReader:
        sink = NcclSink(token, CPU, config=self.config, nccl=self.nccl)
        reader = sink.connect(self.server.address, key or self.guard.new_link(), self.memory.size)
        self.readers.append(reader)
        return reader

    def control(self) -> socket.socket:
        """What a sink says on its control connection is up to the test, which has joined the communicator."""
        connection = self.authenticated()
        _, _, unique_id = wire.INVITATION.unpack(tcp_wire.receive_bytes(connection, wire.INVITATION.size, stop=never))
        Joiner(self.nccl, CPU, 1.0).join(unique_id, wire.SINK_RANK, never)
        connection.sendall(wire.JOINED)
        assert tcp_wire.receive_bytes(connection, 1, stop=never) == wire.JOINED
        return connection

    def authenticated(self) -> socket.socket:
        key = self.guard.new_link()
        return dial(parse_address(self.server.address, key), key, TOKEN, wire.MAGIC, stop=never)

    def expected(self, runs: Sequence[Run]) -> torch.Tensor:
        ranges = [piece_range(run.layer_group, run.first_block + i) for run in runs for i in range(run.num_blocks)]
        return torch.cat([self.memory.tensor[start : start + size] for start, size in ranges])

    def at_rest(self) -> bool:
        return self.guard.num_reading == 0 and self.server._stages.qsize() == CONFIG.num_stages

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.server.close()
        assert self.at_rest(), (self.guard.num_reading, self.server._stages.qsize())
        threads = {"kv-accept", "kv-send", "kv-nccl-watch"}
        until(lambda: not threads & {thread.name for thread in threading.enumerate()})


def never() -> bool:
    return False


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def read(reader: NcclReader, runs: Sequence[Run], lease_id: str = LEASE, stop: Event | None = None) -> torch.Tensor:
    sizes = [len(GROUPS[run.layer_group]) * LAYOUT.layer_bytes for run in runs]
    stage = torch.zeros(sum(run.num_blocks * size for run, size in zip(runs, sizes, strict=True)), dtype=torch.uint8)
    reader.read_into(lease_id, runs, sizes, stage, stop or Event())
    return stage


def until(condition) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def closed_by_peer(connection: socket.socket) -> bool:
    try:
        tcp_wire.receive_bytes(connection, 1, stop=never)
    except (tcp_wire.Disconnected, OSError) as error:
        return "silent" not in str(error)
    return False


RUNS = [Run(0, 1, 3), Run(1, 0, 5)]


class TestReading:
    def test_pieces_arrive_packed_in_order_over_several_chunks(self, world: World) -> None:
        reader = world.connect()
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))
        assert len(world.expected(RUNS)) > 3 * CONFIG.chunk_bytes
        until(world.at_rest)  # an idle sink holds no stage
        assert world.nccl.networks[0].aborted == []

    def test_many_reads_from_two_threads_share_one_communicator(self, world: World) -> None:
        reader = world.connect()
        dice = random.Random(3)
        wanted = [
            [Run(dice.randrange(2), dice.randrange(5), dice.randrange(1, 6)) for _ in range(dice.randrange(1, 4))]
            for _ in range(60)
        ]
        with ThreadPoolExecutor(2) as pool:
            for runs, stage in zip(wanted, pool.map(lambda runs: read(reader, runs), wanted), strict=True):
                assert torch.equal(stage, world.expected(runs))
        assert len(world.nccl.networks) == 1
        assert world.guard.num_reads == 60
        until(world.at_rest)

    def test_an_ended_lease_is_refused_and_the_communicator_goes_on(self, world: World) -> None:
        reader = world.connect()
        with pytest.raises(TransferError, match="refused"):
            read(reader, RUNS, "another lease")
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))
        assert len(world.nccl.networks) == 1

    def test_nothing_arrives_any_more_when_not_all_of_a_read_could_be_posted(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever it was that failed: the stage is used for something else at once."""
        reader, network = world.connect(), world.nccl.networks[0]
        receive, num_calls = FakeCommunicator.receive, 0

        def broken(self: FakeCommunicator, buffer: torch.Tensor) -> FakeOperation:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 2:
                raise RuntimeError("no more")
            return receive(self, buffer)

        network.held = True
        monkeypatch.setattr(FakeCommunicator, "receive", broken)
        with pytest.raises(RuntimeError):
            read(reader, RUNS)
        assert network.aborted[0] == wire.SINK_RANK
        monkeypatch.undo()
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))
        assert len(world.nccl.networks) == 2

    def test_a_link_that_ends_takes_its_communicator_with_it(self, world: World) -> None:
        key = world.guard.new_link()
        reader = world.connect(key)
        del world.guard.keys[key[:LINK_ID_BYTES]]
        until(lambda: 0 in world.nccl.networks[0].aborted)
        with pytest.raises(TransferError):
            read(reader, RUNS)

    def test_chunks_of_ranges_hold_their_bytes_in_order(self) -> None:
        dice = random.Random(5)
        for _ in range(200):
            ranges = [(dice.randrange(1000), dice.randrange(1, 40)) for _ in range(dice.randrange(1, 9))]
            chunk_bytes = dice.randrange(1, 50)
            chunks = list(cut(ranges, chunk_bytes))
            every_byte = [byte for offset, size in ranges for byte in range(offset, offset + size)]
            assert [b for chunk in chunks for offset, size in chunk for b in range(offset, offset + size)] == every_byte
            assert all(sum(size for _, size in chunk) == chunk_bytes for chunk in chunks[:-1])
            assert 0 < sum(size for _, size in chunks[-1]) <= chunk_bytes


class TestWhoMayRead:
    @pytest.mark.parametrize("fault", ["token", "secret", "link", "address"])
    def test_no_communicator_is_made_with_one_that_proves_nothing(self, world: World, fault: str) -> None:
        key = world.guard.new_link()
        if fault == "address":
            with pytest.raises(TransferError, match="malformed"):
                NcclSink(TOKEN, CPU, config=CONFIG, nccl=world.nccl).connect("nowhere", key, 1)
        else:
            if fault == "secret":
                key = key[:-1] + bytes([key[-1] ^ 1])
            elif fault == "link":
                key = os.urandom(LINK_KEY_BYTES)
            with pytest.raises(TransferError, match="cannot be used"):
                world.connect(key, "another token" if fault == "token" else TOKEN)
        assert world.nccl.num_joins == 0
        assert world.nccl.networks == []

    def test_a_sink_of_plain_tcp_is_not_served(self, world: World) -> None:
        key = world.guard.new_link()
        with pytest.raises(tcp_wire.Disconnected):
            dial(parse_address(world.server.address, key), key, TOKEN, tcp_wire.MAGIC, stop=never)

    def test_more_sinks_than_communicators_are_turned_away(self, world: World) -> None:
        readers = [world.connect() for _ in range(CONFIG.max_communicators)]
        with pytest.raises(TransferError):
            world.connect()
        assert torch.equal(read(readers[0], RUNS), world.expected(RUNS))


class TestHostileSink:
    @pytest.mark.parametrize(
        "request_",
        [
            wire.REQUEST.pack(1, 0, 0) + b"x",
            wire.REQUEST.pack(1, wire.MAX_RUNS + 1, 1) + b"x",
            wire.REQUEST.pack(wire.MAX_LEASE_ID_BYTES + 1, 1, 1),
            wire.REQUEST.pack(1, 1, 1) + b"x" + wire.RUN.pack(0, 0, wire.MAX_PIECES + 1),
            wire.REQUEST.pack(1, 2, 1) + b"x" + wire.RUN.pack(0, 0, 0xFFFFFFFF) * 2,
            wire.REQUEST.pack(1, 1, 0) + b"x" + wire.RUN.pack(0, 0, 0),
        ],
        ids=["no runs", "too many runs", "long lease id", "too many pieces", "very many pieces", "no pieces"],
    )
    def test_a_request_out_of_bounds_ends_the_connection(self, world: World, request_: bytes) -> None:
        connection = world.control()
        connection.sendall(request_)
        assert closed_by_peer(connection)
        connection.close()
        assert world.guard.num_reads == 0
        until(lambda: world.nccl.networks[0].aborted == [0])
        reader = world.connect()
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))

    @pytest.mark.parametrize("run", [(2, 0, 1), (0, 0xFFFFFFF0, 1), (0xFFFFFFFF, 0xFFFFFFFF, 9)])
    def test_pieces_that_do_not_exist_are_refused(self, world: World, run: tuple[int, int, int]) -> None:
        connection = world.control()
        connection.sendall(wire.REQUEST.pack(len(LEASE), 1, 512) + LEASE.encode() + wire.RUN.pack(*run))
        assert tcp_wire.receive_bytes(connection, wire.REPLY.size, stop=never) == wire.REPLY.pack(wire.REFUSED, 0)
        connection.close()

    def test_a_sink_that_expects_another_size_is_told_and_sent_nothing(self, world: World) -> None:
        connection = world.control()
        size = piece_range(0, 0)[1]
        connection.sendall(wire.REQUEST.pack(len(LEASE), 1, size + 1) + LEASE.encode() + wire.RUN.pack(0, 0, 1))
        reply = tcp_wire.receive_bytes(connection, wire.REPLY.size, stop=never)
        assert wire.REPLY.unpack(reply) == (wire.WRONG_SIZE, size)
        until(world.at_rest)
        assert world.nccl.networks[0].num_moved == 1  # the byte that a communicator starts with
        connection.close()

    def test_one_that_takes_nothing_loses_its_communicator_and_gives_the_stages_back(self, world: World) -> None:
        connection = world.control()
        runs = wire.RUN.pack(0, 1, 3) + wire.RUN.pack(1, 0, 5)
        size = len(world.expected(RUNS))
        connection.sendall(wire.REQUEST.pack(len(LEASE), 2, size) + LEASE.encode() + runs)
        assert wire.REPLY.unpack(tcp_wire.receive_bytes(connection, wire.REPLY.size, stop=never)) == (wire.OK, size)
        until(lambda: world.nccl.networks[0].aborted == [0])
        until(world.at_rest)
        assert closed_by_peer(connection)
        connection.close()


class HostileSource:
    """Proves the link as a source does, then says `invitation` and `reply`."""

    def __init__(self, nccl: FakeNccl, invitation: bytes, reply: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, args=(nccl, invitation, reply), daemon=True)
        self._thread.start()

    def _serve(self, nccl: FakeNccl, invitation: bytes, reply: bytes) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.sendall(tcp_wire.GREETING.pack(wire.MAGIC, b"c" * tcp_wire.CHALLENGE_BYTES))
            connection.recv(tcp_wire.PROOF.size, socket.MSG_WAITALL)
            connection.sendall(wire.MAGIC + invitation)
            if reply:
                Joiner(nccl, CPU, 1.0).join(invitation[-128:], wire.SOURCE_RANK, never)
                connection.sendall(wire.JOINED + reply)
            while connection.recv(1 << 16):
                pass

    def close(self) -> None:
        self._listener.close()
        self._thread.join()


class TestHostileSource:
    @pytest.mark.parametrize("chunk_bytes", [0, wire.MAX_CHUNK_BYTES + 1])
    def test_impossible_chunks_are_not_accepted(self, chunk_bytes: int) -> None:
        nccl = FakeNccl()
        source = HostileSource(nccl, wire.INVITATION.pack(wire.OK, chunk_bytes, nccl.unique_id()), b"")
        with pytest.raises(TransferError, match="impossible"):
            NcclSink(TOKEN, CPU, config=CONFIG, nccl=nccl).connect(source.address, os.urandom(LINK_KEY_BYTES), 1)
        source.close()
        assert nccl.num_joins == 0

    @pytest.mark.parametrize("reply", [(wire.OK, 1), (wire.WRONG_SIZE, 7), (77, 0)])
    def test_a_reply_that_does_not_fit_fails_the_communicator(self, reply: tuple[int, int]) -> None:
        nccl = FakeNccl()
        source = HostileSource(nccl, wire.INVITATION.pack(wire.OK, 1000, nccl.unique_id()), wire.REPLY.pack(*reply))
        sink = NcclSink(TOKEN, CPU, config=CONFIG, nccl=nccl)
        reader = sink.connect(source.address, os.urandom(LINK_KEY_BYTES), 1)
        with pytest.raises(TransferError, match="another number of bytes"):
            read(reader, RUNS)
        assert nccl.networks[0].aborted == [1]
        reader.close()
        source.close()

    def test_the_token_does_not_travel(self, world: World) -> None:
        key = world.guard.new_link()
        with socket.create_connection(parse_address(world.server.address, key)) as connection:
            greeting = connection.recv(tcp_wire.GREETING.size, socket.MSG_WAITALL)
            challenge = tcp_wire.GREETING.unpack(greeting)[1]
            digest = challenge_response("a wrong token", challenge + key)
            connection.sendall(tcp_wire.PROOF.pack(wire.MAGIC, key[:LINK_ID_BYTES], digest))
            assert closed_by_peer(connection)
        assert TOKEN.encode() not in greeting


class TestSilence:
    @pytest.mark.parametrize("absent", [wire.SOURCE_RANK, wire.SINK_RANK])
    def test_a_peer_that_never_joins_is_given_up_in_time(self, world: World, absent: int) -> None:
        world.nccl.absent = {absent}
        start = time.monotonic()
        with pytest.raises(TransferError):
            world.connect()
        assert time.monotonic() - start < SOON
        network = world.nccl.networks[0]
        network.arrived[absent].set()  # it comes late
        until(lambda: 1 - absent in network.aborted)
        world.nccl.absent = set()
        assert torch.equal(read(world.connect(), RUNS), world.expected(RUNS))

    def test_a_transfer_that_stands_still_aborts_its_communicator_alone(self, world: World) -> None:
        stuck, healthy = world.connect(), world.connect()
        world.nccl.networks[0].held = True
        start = time.monotonic()
        with pytest.raises(TransferError, match=r"silent|hung up"):
            read(stuck, RUNS)
        assert time.monotonic() - start < SOON
        until(lambda: sorted(world.nccl.networks[0].aborted) == [0, 1])
        assert world.nccl.networks[1].aborted == []
        assert torch.equal(read(healthy, RUNS), world.expected(RUNS))
        assert len(world.nccl.networks) == 2
        until(world.at_rest)

    def test_the_next_read_makes_a_new_communicator(self, world: World) -> None:
        reader = world.connect()
        world.nccl.networks[0].held = True
        with pytest.raises(TransferError):
            read(reader, RUNS)
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))
        until(lambda: [sorted(network.aborted) for network in world.nccl.networks] == [[0, 1], []])

    def test_both_reads_in_flight_fail_with_their_communicator(self, world: World) -> None:
        reader = world.connect()
        world.nccl.networks[0].held = True
        with ThreadPoolExecutor(2) as pool:
            reads = [pool.submit(read, reader, [Run(0, 0, 1)]) for _ in range(2)]
            for failed in reads:
                assert isinstance(failed.exception(SOON), TransferError)
        world.nccl.networks[0].release()
        assert world.nccl.networks[0].num_moved == 1  # nothing was written after the reads had failed
        until(world.at_rest)

    def test_an_error_that_nccl_reports_ends_the_transfer_before_its_deadline(self, world: World) -> None:
        reader = world.connect()
        world.nccl.networks[0].held = True
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, reader, RUNS)
            until(lambda: world.guard.num_reads == 1)
            world.nccl.networks[0].error = "remote process exited"
            assert reading.exception(CONFIG.transfer_s / 2) is not None
        world.nccl.networks[0].error = ""

    def test_a_source_that_does_not_answer_is_left_when_the_pull_stops(self, world: World) -> None:
        reader = world.connect()
        world.guard.gate.clear()
        stop = Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, reader, RUNS, LEASE, stop)
            stop.set()
            assert isinstance(reading.exception(SOON), TransferError)
        assert 1 in world.nccl.networks[0].aborted
        world.guard.gate.set()
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))


class TestStopping:
    def test_a_transfer_that_ends_by_itself_spares_the_communicator(self, world: World) -> None:
        reader = world.connect()
        network = world.nccl.networks[0]
        network.held = True
        stop = Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, reader, RUNS, LEASE, stop)
            until(lambda: world.guard.num_reads == 1)
            stop.set()
            threading.Timer(STOP_S / 2, network.release).start()
            assert torch.equal(reading.result(SOON), world.expected(RUNS))
        assert torch.equal(read(reader, RUNS), world.expected(RUNS))
        assert len(world.nccl.networks) == 1

    def test_one_that_does_not_end_is_given_up_long_before_its_deadline(self) -> None:
        world = World(replace(CONFIG, transfer_s=60.0))
        reader = world.connect()
        world.nccl.networks[0].held = True
        stop = Event()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, reader, RUNS, LEASE, stop)
            until(lambda: world.guard.num_reads == 1)
            stop.set()
            assert isinstance(reading.exception(SOON), TransferError)
        world.close()

    def test_a_source_that_closes_in_mid_transfer_ends_it_on_both_sides(self) -> None:
        world = World()
        reader = world.connect()
        world.nccl.networks[0].held = True
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, reader, RUNS)
            until(lambda: world.guard.num_reads == 1)
            world.server.close()
            assert isinstance(reading.exception(SOON), TransferError)
        assert world.at_rest()
        world.close()

    def test_a_source_that_is_gone_fails_the_next_read(self) -> None:
        world = World()
        reader = world.connect()
        world.server.close()
        with pytest.raises(TransferError, match="cannot be used"):
            read(reader, RUNS)
        world.close()


class TestHandoff:
    """Real KvSource and KvSink over the fake communicators."""

    async def test_kv_arrives_in_the_blocks_of_the_sink_and_the_lease_is_given_back(self) -> None:
        nccl = FakeNccl()
        source = await nccl_peer.Source.start(CPU, LAYOUT, (1, 4), 64, nccl)
        sink = nccl_peer.Sink.start(CPU, LAYOUT, 64, nccl)
        for tokens in (100, 3, 4):
            answer = await sink.pull(source.offer(tokens), tokens)
            assert (answer["exact"], answer["token"]) == (True, nccl_peer.FIRST_TOKEN)
        await asyncio.to_thread(until, lambda: len(source.released) == 3)  # the last acknowledgement may be on its way
        assert source.released == ["r1#1", "r2#2", "r3#3"]
        assert len(nccl.networks) == 1
        await sink.close()
        await source.close()

    async def test_a_transfer_that_stands_still_fails_the_pull_and_the_next_one_works(self) -> None:
        nccl = FakeNccl()
        source = await nccl_peer.Source.start(CPU, LAYOUT, (1, 4), 64, nccl)
        sink = nccl_peer.Sink.start(CPU, LAYOUT, 64, nccl)
        assert (await sink.pull(source.offer(4), 4))["exact"]
        nccl.networks[0].held = True
        pulling = asyncio.create_task(sink.pull(source.offer(100), 100))
        await asyncio.to_thread(until, lambda: bool(nccl.networks[0]._posted[1]))
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert (await sink.pull(source.offer(100), 100))["exact"]
        assert [1 in network.aborted for network in nccl.networks] == [True, False]
        await sink.close()
        await source.close()
        assert len(source.released) == 3
