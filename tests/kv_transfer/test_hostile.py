"""Peers that lie, ports that are probed. Nothing is copied that was not agreed on, and neighbours never notice."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from threading import Event, Thread

import pytest

from engine.auth import challenge_response
from engine.errors import TransferError
from engine.kv.memory import HostMemory
from engine.message_server import MessageServer
from engine.message_stream import MessageStream, connect
from kv_transfer.link import SERVICE, layout_to_message
from kv_transfer.sink import SinkConfig
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import LINK_ID_BYTES, LINK_KEY_BYTES, Fetch
from kv_transfer.transports.shared_memory import SharedMemoryServer, SharedMemorySink
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer
from protos import transfer_pb2 as pb
from tests.kv_transfer.pair import FIRST_TOKEN, GROUPS, LAYOUT, NUM_BLOCKS, TOKEN, Pair, failure, pair, print_of, until

MAX_CONNECTIONS = 32

# Who may talk at all.


async def test_a_sink_with_another_model_is_refused_by_name() -> None:
    async with pair(source_model="another") as p:
        _, offer, _ = p.open(8)
        error = await failure(p.pull(offer, 8))
        assert "model: another is not model" in str(error)
        assert not error.retryable


async def test_a_source_that_hides_its_fingerprint_in_the_offer_is_still_refused_by_name() -> None:
    async with pair(source_model="another") as p:
        _, offer, _ = p.open(8)
        forged = pb.KvOffer.FromString(offer)
        forged.fingerprint = print_of(p.sink_memory)
        assert "model: model is not another" in str(await failure(p.pull(forged.SerializeToString(), 8)))
        assert p.untouched()


async def test_layouts_that_do_not_fit_are_refused_by_name() -> None:
    async with pair(layout=LAYOUT, sink_layout=replace(LAYOUT, block_size=6)) as p:
        _, offer, _ = p.open(8)
        assert "block_size" in str(await failure(p.pull(offer, 8)))


async def test_a_sink_without_the_token_is_refused() -> None:
    async with pair(sink_token="wrong") as p:
        _, offer, _ = p.open(8)
        assert "token is missing or wrong" in str(await failure(p.pull(offer, 8)))


# A source that lies. Scripted: its greeting and what it says next are the test's.


@asynccontextmanager
async def liar(p: Pair, answers: list[pb.SourceMessage], **greeting: object) -> AsyncIterator[bytes]:
    """An offer of 8 tokens from a source that greets with these changes and then says `answers`."""

    async def serve(stream: MessageStream) -> None:
        await stream.read()
        truth = {
            "epoch": "liar",
            "layout": layout_to_message(LAYOUT),
            "num_blocks": NUM_BLOCKS,
            "lease_ms": 60_000,
            "transport": "loopback",
            "transport_address": "pool",
        }
        stream.send(pb.SourceMessage(hello=pb.HelloReply(**truth | greeting)))
        await stream.read()
        for answer in answers:
            stream.send(answer)
        await stream.read()

    server = MessageServer("127.0.0.1", token=TOKEN)
    server.register(SERVICE, pb.SinkMessage.FromString, serve)
    await server.start()
    offer = pb.KvOffer(
        lease_id="x",
        epoch="liar",
        fingerprint=print_of(p.sink_memory),
        link_address=server.address,
        num_tokens=8,
        block_ids=[0, 1],
        layer_groups=GROUPS,
    )
    try:
        yield offer.SerializeToString()
    finally:
        await server.stop()


def announcement(
    group: int, first: int, count: int, last: bool = False, num_checksums: int | None = None
) -> pb.SourceMessage:
    token = pb.FirstToken(token_id=1) if last else None
    pieces = pb.Pieces(
        layer_group=group,
        first_block=first,
        num_blocks=count,
        checksums=[7] * min(8, count if num_checksums is None else num_checksums),
    )
    return pb.SourceMessage(announcement=pb.Announcement(lease_id="x", pieces=[pieces], first_token=token))


def together(*messages: pb.SourceMessage) -> pb.SourceMessage:
    pieces = [each for message in messages for each in message.announcement.pieces]
    return pb.SourceMessage(announcement=pb.Announcement(lease_id="x", pieces=pieces))


def layout(**change: object) -> dict[str, object]:
    message = layout_to_message(LAYOUT)
    for name, value in change.items():
        setattr(message, name, value)
    return {"layout": message}


@pytest.mark.parametrize(
    "greeting",
    [
        {"num_blocks": 0},
        {"num_blocks": 1},
        {"num_blocks": 2**32 - 1},
        {"lease_ms": 0},
        {"transport": "telepathy"},
        {"transport": ""},
        {"transport_address": "nowhere"},
        {"epoch": "2"},
        {"layout": None},
        layout(num_layers=0),
        layout(num_layers=2**32 - 1),
        layout(num_layers=3),
        layout(head_dim=2**31),
        layout(block_size=2**32 - 4),
        layout(dtype="pickle"),
        layout(first_layer=2**32 - 1),
        layout(num_kv_heads=2**32 - 1),
    ],
)
async def test_a_greeting_that_lies_about_sizes_copies_nothing(greeting: dict) -> None:
    async with pair() as p, liar(p, [announcement(0, 0, 2), announcement(1, 0, 2, True)], **greeting) as offer:
        await failure(p.pull(offer, 8, timeout=5.0))
        assert p.untouched()


@pytest.mark.parametrize(
    "answers",
    [
        [announcement(2, 0, 1)],
        [announcement(2**32 - 1, 0, 1)],
        [announcement(0, 1, 1)],
        [announcement(0, 0, 3)],
        [announcement(0, 2**32 - 1, 1)],
        [announcement(0, 0, 1), announcement(0, 0, 1)],
        [together(announcement(0, 0, 1), announcement(0, 0, 1))],
        [together(announcement(1, 0, 2), announcement(0, 0, 3))],
        [together(*[announcement(0, 0, 0)] * 9, announcement(7, 0, 1))],
        [announcement(0, 0, 2, last=True)],
        [announcement(0, 0, 2), announcement(1, 0, 1, last=True)],
        [pb.SourceMessage(closed=pb.Closed(lease_id="x", valid=True))],
    ],
)
async def test_announcements_out_of_bounds_or_order_fail_the_pull(answers: list) -> None:
    async with pair() as p, liar(p, answers) as offer:
        assert (await failure(p.pull(offer, 8, timeout=5.0))).retryable
        assert p.untouched(except_blocks=p.sink_blocks(8))


async def test_what_a_source_says_of_leases_nobody_pulls_is_ignored() -> None:
    other = pb.SourceMessage(closed=pb.Closed(lease_id="other"))
    async with pair() as p, liar(p, [other, pb.SourceMessage()]) as offer:
        assert "silent" in str(await failure(p.pull(offer, 8, timeout=5.0)))


def changed(**change: object) -> Callable[[pb.KvOffer], None]:
    def change_offer(offer: pb.KvOffer) -> None:
        for name, value in change.items():
            if isinstance(value, list):
                getattr(offer, name)[:] = value
            else:
                setattr(offer, name, value)

    return change_offer


@pytest.mark.parametrize(
    "change",
    [
        changed(block_ids=[0]),
        changed(block_ids=[0, 1, 2]),
        changed(block_ids=[0, NUM_BLOCKS]),
        changed(block_ids=[0, 2**32 - 1]),
        changed(num_tokens=0),
        changed(num_tokens=9),
        changed(num_tokens=2**32 - 1),
        changed(layer_groups=[]),
        changed(layer_groups=[1]),
        changed(layer_groups=[1, 5]),
        changed(layer_groups=[2, 2, 4]),
        changed(layer_groups=[3, 1, 4]),
        changed(layer_groups=[0, 4]),
        changed(lease_id="no such lease"),
        changed(epoch="9"),
        changed(link_address="127.0.0.1:1"),
        changed(link_address=""),
    ],
)
async def test_an_offer_that_was_tampered_with_copies_nothing(change: Callable) -> None:
    async with pair(sink_config=SinkConfig(connect_s=1.0)) as p:
        lease_id, offer, _ = p.open(8)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        forged = pb.KvOffer.FromString(offer)
        change(forged)
        await failure(p.pull(forged.SerializeToString(), 8))
        assert p.untouched()


async def test_garbage_for_an_offer_is_refused() -> None:
    async with pair() as p:
        for seed in range(200):
            await failure(p.pull(Random(seed).randbytes(1 + seed), 8))
        assert p.untouched()


# A sink that lies.


@asynccontextmanager
async def raw_link(p: Pair, **hello: object) -> AsyncIterator[MessageStream]:
    stream = await connect(p.address, SERVICE, TOKEN, pb.SourceMessage.FromString)
    truth = {
        "fingerprint": print_of(p.sink_memory),
        "layout": layout_to_message(LAYOUT),
        "transports": ["tcp"],
    }
    stream.send(pb.SinkMessage(hello=pb.Hello(**truth | hello)))
    yield stream
    stream.abort()


async def test_a_sink_cannot_touch_a_lease_that_another_sink_has_opened() -> None:
    async with pair("tcp") as p:
        lease_id, offer, blocks = p.open(8)
        task = p.pull(offer, 8)
        await until(lambda: p.source._held[lease_id].link is not None)
        async with raw_link(p) as stream:
            reply = (await stream.read()).hello
            stream.send(pb.SinkMessage(open=pb.Open(lease_id=lease_id)))
            assert not (await stream.read()).closed.valid
            stream.send(pb.SinkMessage(renew=pb.Renew(lease_ids=[lease_id, "nonsense"])))
            stream.send(pb.SinkMessage(close=pb.Close(lease_id=lease_id, pulled=True)))
            assert not (await stream.read()).closed.valid
            assert p.source.begin_read(reply.transport_key[:LINK_ID_BYTES], lease_id, [(0, 0)]) is None
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await task
        p.check(blocks, 8)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff",
        b"",
        pb.SinkMessage(hello=pb.Hello()),
        pb.SinkMessage(open=pb.Open(lease_id="r#1", first_block=2**32 - 1)),
        pb.SinkMessage(close=pb.Close(lease_id="\x00", pulled=True)),
    ],
)
async def test_a_sink_that_talks_nonsense_harms_only_itself(message: object) -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(8)
        async with raw_link(p) as stream:
            await stream.read()
            stream.send_bytes(message if isinstance(message, bytes) else message.SerializeToString())
            await stream.read()
        p.source.finish(lease_id, FIRST_TOKEN, False)
        await p.pull(offer, 8)
        p.check(blocks, 8)


async def test_only_final_blocks_of_an_opened_lease_can_be_read() -> None:
    async with pair("tcp") as p:
        lease_id, offer, _ = p.open(30, 2)
        task = p.pull(offer, 30)
        await until(lambda: p.source._held[lease_id].link is not None)
        link_id = p.source._held[lease_id].link.id
        assert p.source.begin_read(link_id, lease_id, [(0, 2)]) is None
        assert p.source.begin_read(link_id, lease_id, [(2, 0)]) is None
        assert p.source.begin_read(link_id, lease_id, [(0, 1), (1, 2**32 - 1)]) is None
        assert p.source.begin_read(b"x" * LINK_ID_BYTES, lease_id, [(0, 0)]) is None
        assert len(p.source.begin_read(link_id, lease_id, [(0, 0), (1, 1)])) == 2
        p.source.end_read(lease_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# The data port.


class OneLease:
    """A ReadGuard with one lease, "r", of the first block, for one link."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.key = os.urandom(LINK_KEY_BYTES)
        self.num_reads = 0

    def link_key(self, link_id: bytes) -> bytes | None:
        return self.key if link_id == self.key[:LINK_ID_BYTES] else None

    def begin_read(self, link_id: bytes, lease_id: str, pieces: list) -> list | None:  # noqa: ARG002
        if lease_id != "r" or any(piece != (0, 0) for piece in pieces):
            return None
        self.num_reads += 1
        return [(0, self.memory.layout.block_bytes)] * len(pieces)

    def end_read(self, lease_id: str) -> None:  # noqa: ARG002
        self.num_reads -= 1


@pytest.fixture
def port():
    memory = HostMemory(LAYOUT, 2)
    memory.block(0)[:] = Random(1).randbytes(LAYOUT.block_bytes)
    server = TcpServer(memory, host="127.0.0.1", token=TOKEN, max_connections=MAX_CONNECTIONS)
    guard = OneLease(memory)
    server.start(guard)
    yield server, guard
    server.close()
    assert guard.num_reads == 0
    memory.close()


def ignore(part: memoryview) -> None:
    pass


def read_one(server: TcpServer, guard: OneLease, token: str = TOKEN, lease_id: str = "r") -> bytes:
    reader = TcpSink(token).connect(server.address, server.key(guard.key), guard.memory.size)
    into = bytearray(LAYOUT.block_bytes)
    try:
        reader.read(lease_id, [Fetch(0, 0, 0, memoryview(into))], ignore, Event())
    finally:
        reader.close()
    return bytes(into)


def test_the_data_port_serves_who_knows_token_and_key(port: tuple) -> None:
    server, guard = port
    assert read_one(server, guard) == bytes(guard.memory.block(0))
    with pytest.raises(TransferError):
        read_one(server, guard, token="wrong")
    with pytest.raises(TransferError):
        read_one(server, guard, token="")
    with pytest.raises(TransferError, match="refused"):
        read_one(server, guard, lease_id="other")
    guard.key, right = guard.key[:LINK_ID_BYTES] + os.urandom(LINK_KEY_BYTES - LINK_ID_BYTES), guard.key
    reader = TcpSink(TOKEN)
    with pytest.raises(TransferError):
        reader.connect(server.address, right, 0)


def test_garbage_on_the_data_port_harms_nobody(port: tuple) -> None:
    server, guard = port
    host, number = server.address.split(":")
    for seed in range(60):
        random = Random(seed)
        with socket.create_connection((host, int(number)), timeout=5) as probe:
            greeting = _exactly(probe, wire.GREETING.size)
            challenge = wire.GREETING.unpack(greeting)[1]
            if seed % 3 == 0:
                probe.sendall(random.randbytes(wire.PROOF.size))
            else:
                proof = challenge_response(TOKEN, challenge + guard.key)
                probe.sendall(wire.PROOF.pack(wire.MAGIC, guard.key[:LINK_ID_BYTES], proof))
                assert _exactly(probe, len(wire.MAGIC)) == wire.MAGIC
                request = random.choice(
                    [
                        random.randbytes(40),
                        wire.REQUEST.pack(65535, 1),
                        wire.REQUEST.pack(1, 2**32 - 1),
                        wire.REQUEST.pack(1, 0),
                        wire.REQUEST.pack(1, 1) + b"r" + wire.PIECE.pack(2**32 - 1, 7),
                        wire.REQUEST.pack(4, 1) + b"\xff\xfe\x00." + wire.PIECE.pack(0, 0),
                        wire.REQUEST.pack(1, 1)[:3],
                        wire.REQUEST.pack(1, 4096) + b"r" + wire.PIECE.pack(0, 0) * 4096,  # and never reads the answer
                    ]
                )
                probe.sendall(request)
    assert read_one(server, guard) == bytes(guard.memory.block(0))


def test_too_many_data_connections_are_turned_away_and_places_come_back(port: tuple) -> None:
    server, guard = port
    host, number = server.address.split(":")
    probes = [socket.create_connection((host, int(number)), timeout=5) for _ in range(MAX_CONNECTIONS)]
    for probe in probes:
        _exactly(probe, wire.GREETING.size)
    with socket.create_connection((host, int(number)), timeout=5) as extra:
        assert extra.recv(1) == b""
    for probe in probes:
        probe.close()
    for thread in list(server._listener._connections.values()):
        thread.join(5)
    assert read_one(server, guard) == bytes(guard.memory.block(0))


def test_a_data_port_outlives_a_shortage_of_threads(port: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    server, guard = port
    start, refused = Thread.start, []

    def short(thread: Thread) -> None:
        if thread.name == "kv-send":
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(Thread, "start", short)
    with pytest.raises(TransferError):
        read_one(server, guard)
    monkeypatch.undo()
    assert len(refused) == 1
    assert read_one(server, guard) == bytes(guard.memory.block(0))


@pytest.mark.parametrize(
    "reply", [b"", b"x" * 8, b"\x00" * 12, wire.REPLY.pack(0, 3) + b"abc", wire.REPLY.pack(0, 2**63)]
)
def test_a_data_port_that_lies_fails_the_read(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(wire.GREETING.pack(wire.MAGIC, bytes(wire.CHALLENGE_BYTES)))
                _exactly(connection, wire.PROOF.size)
                connection.sendall(wire.MAGIC)
                _exactly(connection, wire.REQUEST.size + 1 + wire.PIECE.size)
                connection.sendall(reply)

        thread = Thread(target=serve)
        thread.start()
        reader = TcpSink("").connect(f"127.0.0.1:{listener.getsockname()[1]}", bytes(LINK_KEY_BYTES), 0)
        into = bytearray(64)
        with pytest.raises(TransferError):
            reader.read("r", [Fetch(0, 0, 0, memoryview(into))], ignore, Event())
        assert into == bytes(64)
        assert reader._idle == [], "a connection that failed is not used again"
        thread.join(5)


def test_a_read_from_a_stalled_port_ends_when_it_is_stopped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(wire.GREETING.pack(wire.MAGIC, bytes(wire.CHALLENGE_BYTES)))
                _exactly(connection, wire.PROOF.size)
                connection.sendall(wire.MAGIC)
                _exactly(connection, wire.REQUEST.size + 1 + wire.PIECE.size)
                connection.sendall(wire.REPLY.pack(0, 64) + b"only this")
                stop.set()
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(1)

        thread = Thread(target=serve)
        thread.start()
        reader = TcpSink("").connect(f"127.0.0.1:{listener.getsockname()[1]}", bytes(LINK_KEY_BYTES), 0)
        with pytest.raises(TransferError, match="stopped"):
            reader.read("r", [Fetch(0, 0, 0, memoryview(bytearray(64)))], ignore, stop)
        thread.join(5)
        assert not thread.is_alive()


def test_the_data_port_is_not_opened_to_other_machines_without_a_token() -> None:
    memory = HostMemory(LAYOUT, 1)
    with pytest.raises(ValueError, match="token"):
        TcpServer(memory, host="0.0.0.0", token="")
    memory.close()


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:1e3", "h:١"])
def test_malformed_tcp_addresses_are_refused(address: str) -> None:
    with pytest.raises(TransferError):
        TcpSink("").connect(address, bytes(LINK_KEY_BYTES), 1)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        assert part, "closed early"
        data += part
    return data


# Shared memory.


def test_only_the_right_process_memory_is_mapped() -> None:
    memory, other = HostMemory(LAYOUT, 2), HostMemory(LAYOUT, 1)
    server = SharedMemoryServer(memory)
    key = server.key(b"")
    pid, pool, key_fd = server.address.split(":")
    sink = SharedMemorySink()
    sink.connect(server.address, key, memory.size).close()
    read_end, write_end = os.pipe()
    for address, wrong_key, size in (
        (server.address, bytes(32), memory.size),
        (server.address, b"short", memory.size),
        (server.address, key, memory.size + 1),
        (f"{pid}:{other.fd}:{key_fd}", key, memory.size),
        (f"{pid}:{read_end}:{key_fd}", key, memory.size),
        (f"{pid}:{pool}:{read_end}", key, memory.size),
        (f"{pid}:{pool}:{pool}", key, memory.size),
        (f"{pid}:99999:{key_fd}", key, memory.size),
        (f"1:{pool}:{key_fd}", key, memory.size),
        (f"999999999:{pool}:{key_fd}", key, memory.size),
        ("../..:0:0", key, memory.size),
        (f"{pid}:{pool}", key, memory.size),
        (f"{pid}:{pool}:{key_fd}:0", key, memory.size),
        (f"-{pid}:{pool}:{key_fd}", key, memory.size),
        ("", key, memory.size),
    ):
        with pytest.raises(TransferError):
            sink.connect(address, wrong_key, size)
    for fd in (read_end, write_end):
        os.close(fd)
    server.close()
    memory.close()
    other.close()


def test_a_mapped_pool_cannot_be_written_by_the_sink() -> None:
    memory = HostMemory(LAYOUT, 1)
    server = SharedMemoryServer(memory)
    reader = SharedMemorySink().connect(server.address, server.key(b""), memory.size)
    with pytest.raises(TypeError):
        reader._mapping[0] = 1
    reader.close()
    server.close()
    memory.close()


def test_header_sizes_are_what_the_protocol_says() -> None:
    assert (wire.REQUEST.size, wire.PIECE.size, wire.REPLY.size) == (6, 8, 12)
    assert struct.calcsize("<8s32s") == wire.GREETING.size
