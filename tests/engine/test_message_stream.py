"""Streams of messages over real sockets: order, ends, errors, and peers that lie, stall or probe."""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine import message_server, message_stream
from engine.auth import challenge_response
from engine.message_server import MessageServer
from engine.message_stream import (
    MAX_GREETING_BYTES,
    MAX_MESSAGE_BYTES,
    MessageStream,
    StreamLost,
    StreamRefused,
    connect,
)
from protos import transfer_pb2 as pb

SERVICE = "echo"
TOKEN = "a token"
TIMEOUT_S = 20.0


def heard(lease_id: str) -> pb.Closed:
    return pb.Closed(lease_id=lease_id)


async def echo(stream: MessageStream) -> None:
    while (message := await stream.read()) is not None:
        stream.send(message)


@asynccontextmanager
async def serving(serve: Callable[[MessageStream], Any] = echo, token: str = TOKEN) -> AsyncIterator[MessageServer]:
    server = MessageServer("127.0.0.1", token=token)
    server.register(SERVICE, pb.Closed.FromString, serve)
    await server.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield server
    finally:
        await server.stop()
    assert not server._streams


async def client(server: MessageServer) -> MessageStream:
    return await connect(server.address, SERVICE, TOKEN, pb.Closed.FromString)


async def raw(server: MessageServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.address.split(":")
    return await asyncio.open_connection(host, int(port))


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


async def greeted(server: MessageServer, service: bytes = SERVICE.encode()) -> tuple[asyncio.StreamReader, Any]:
    """A raw connection after the handshake."""
    reader, writer = await raw(server)
    challenge = (await reader.readexactly(4 + message_server.CHALLENGE_BYTES))[4:]
    writer.write(framed(challenge_response(TOKEN, challenge + service) + service))
    assert await reader.readexactly(4) == framed(b"")
    return reader, writer


async def test_messages_of_any_size_come_in_order_however_the_bytes_are_cut() -> None:
    rng = random.Random(0)
    sizes = [0, 1, 3, 250, 66_000, 3_000_000, *(rng.randrange(2000) for _ in range(300))]
    sent = [heard("x" * size) for size in sizes]
    async with serving() as server:
        reader, writer = await greeted(server)
        data = b"".join(framed(message.SerializeToString()) for message in sent)

        async def write() -> None:
            at = 0
            while at < len(data):
                part = rng.choice((1, 2, 5, 1000, 200_000))
                writer.write(data[at : at + part])
                at += part
                await writer.drain()

        writing = asyncio.create_task(write())
        for message in sent:
            size = int.from_bytes(await reader.readexactly(4))
            assert pb.Closed.FromString(await reader.readexactly(size)) == message
        await writing
        writer.close()


async def test_what_comes_before_a_receiver_is_kept_and_delivered_first() -> None:
    async with serving() as server:
        stream = await client(server)
        for i in range(500):
            stream.send(heard(str(i)))
        assert (await stream.read()).lease_id == "0"
        got: list[str] = []
        done = asyncio.Event()

        def receive(message: pb.Closed) -> None:
            got.append(message.lease_id)
            if message.lease_id == "499":
                done.set()

        stream.deliver_to(receive)
        await done.wait()
        assert got == [str(i) for i in range(1, 500)]
        stream.abort()


async def test_who_does_not_read_makes_the_peer_wait() -> None:
    async with serving() as server:
        stream = await client(server)
        for i in range(2000):
            stream.send(heard("x" * 10_000 + str(i)))
        while not stream._paused_reading:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        for i in range(2000):
            assert len(stream._unread) <= message_stream.MAX_UNREAD
            assert (await stream.read()).lease_id == "x" * 10_000 + str(i)
        stream.abort()


async def test_what_was_not_read_before_a_clean_end_is_delivered() -> None:
    async def say(stream: MessageStream) -> None:
        for name in "abc":
            stream.send(heard(name))

    async with serving(say) as server:
        stream, got = await client(server), []
        assert (await stream.read()).lease_id == "a"
        await stream.wait_over()
        stream.deliver_to(lambda message: got.append(message.lease_id))
        assert got == ["b", "c"]


async def test_a_clean_end_is_none_after_the_last_message() -> None:
    async def say(stream: MessageStream) -> None:
        stream.send(heard("last"))

    async with serving(say) as server:
        stream = await client(server)
        assert (await stream.read()).lease_id == "last"
        assert await stream.read() is None
        await stream.wait_over()
        stream.send(heard("into nothing"))
        stream.abort(StreamLost("too late to matter"))
        assert await stream.read() is None


async def test_what_a_receiver_raises_ends_its_stream_only_and_comes_out() -> None:
    async with serving() as server:
        other, stream = await client(server), await client(server)

        def receive(message: pb.Closed) -> None:
            raise KeyError(message.lease_id)

        stream.deliver_to(receive)
        stream.send(heard("a"))
        with pytest.raises(KeyError, match="a"):
            await stream.wait_over()
        other.send(heard("b"))
        assert (await other.read()).lease_id == "b"
        other.abort()


async def test_nothing_is_delivered_after_what_a_receiver_raised() -> None:
    async with serving() as server:
        reader, writer = await greeted(server)
        stream = next(iter(server._streams))
        got: list[str] = []

        def receive(message: pb.Closed) -> None:
            got.append(message.lease_id)
            raise KeyError("no")

        stream.deliver_to(receive)
        writer.write(b"".join(framed(heard(name).SerializeToString()) for name in "abc"))
        assert await reader.read() == b""
        assert got == ["a"]
        writer.close()


async def test_a_service_that_fails_costs_its_own_stream() -> None:
    async def fail(stream: MessageStream) -> None:
        raise KeyError((await stream.read()).lease_id)

    async with serving(fail) as server:
        for name in "ab":
            stream = await client(server)
            stream.send(heard(name))
            assert await stream.read() is None


async def test_the_first_error_counts() -> None:
    async with serving() as server:
        stream = await client(server)
        stream.abort(StreamLost("first"))
        stream.abort(StreamLost("second"))
        with pytest.raises(StreamLost, match="first"):
            await stream.wait_over()
        with pytest.raises(StreamLost, match="first"):
            await stream.read()


async def test_a_message_that_is_malformed_or_too_long_ends_the_stream() -> None:
    async with serving() as server:
        for nonsense in (framed(b"\xff\xff\xff"), (MAX_MESSAGE_BYTES + 1).to_bytes(4), b"\xff\xff\xff\xff"):
            reader, writer = await greeted(server)
            writer.write(nonsense)
            assert await reader.read() == b""
            writer.close()
        stream = await client(server)
        stream.send(heard("x" * MAX_MESSAGE_BYTES))
        with pytest.raises(StreamLost, match="longer than"):
            await stream.wait_over()


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "2"])
async def test_without_the_token_nothing_is_served(token: str) -> None:
    served = []

    async def serve(stream: MessageStream) -> None:
        served.append(stream)

    async with serving(serve) as server:
        with pytest.raises(StreamRefused, match="token is missing or wrong"):
            await connect(server.address, SERVICE, token, pb.Closed.FromString)
        assert not served


async def test_a_proof_serves_one_challenge_and_one_service() -> None:
    async with serving() as server:
        reader, writer = await raw(server)
        challenge = (await reader.readexactly(4 + message_server.CHALLENGE_BYTES))[4:]
        proof = challenge_response(TOKEN, challenge + SERVICE.encode())
        writer.write(framed(proof + b"another"))
        assert b"token" in await reader.read()
        _, writer = await raw(server)
        reader, writer = await raw(server)
        await reader.readexactly(4 + message_server.CHALLENGE_BYTES)
        writer.write(framed(proof + SERVICE.encode()))
        assert b"token" in await reader.read()


async def test_an_unknown_service_is_refused_by_name() -> None:
    async with serving() as server:
        with pytest.raises(StreamRefused, match="no such service"):
            await connect(server.address, "telepathy", TOKEN, pb.Closed.FromString)


async def test_probes_end_and_harm_nobody() -> None:
    rng = random.Random(1)
    async with serving() as server:
        for size in (0, 1, 4, 5, MAX_GREETING_BYTES, MAX_GREETING_BYTES + 5, 100_000):
            reader, writer = await raw(server)
            writer.write(b"\x00\x00\x00\x00" if size == 4 else rng.randbytes(size))
            if size in (0, 1):
                writer.write_eof()
            await reader.read()
            writer.close()
        stream = await client(server)
        stream.send(heard("a"))
        assert (await stream.read()).lease_id == "a"
        stream.abort()


async def test_nothing_long_is_kept_before_the_handshake() -> None:
    async with serving() as server:
        reader, writer = await raw(server)
        await reader.readexactly(4 + message_server.CHALLENGE_BYTES)
        writer.write((MAX_GREETING_BYTES + 1).to_bytes(4))
        assert await reader.read() == b""
        writer.close()


async def test_a_handshake_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_server, "HANDSHAKE_S", 0.1)
    async with serving() as server:
        reader, writer = await raw(server)
        async with asyncio.timeout(2):
            assert len(await reader.read()) == 4 + message_server.CHALLENGE_BYTES
        writer.close()


async def test_strangers_do_not_keep_peers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_server, "MAX_HANDSHAKES", 4)
    async with serving() as server:
        peer = await client(server)
        strangers = [await raw(server) for _ in range(20)]
        late = await client(server)
        for stream in (peer, late):
            stream.send(heard("a"))
            assert (await stream.read()).lease_id == "a"
            stream.abort()
        assert len(server._handshakes) <= 4
        for _, writer in strangers:
            writer.close()


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_server, "MAX_STREAMS", 2)
    async with serving() as server:
        streams = [await client(server) for _ in range(2)]
        with pytest.raises(StreamRefused, match="too many streams"):
            await client(server)
        streams[0].abort()
        while len(streams) < 3:
            with contextlib.suppress(StreamRefused):
                streams.append(await client(server))
        for stream in streams:
            stream.abort()


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "STALL_S", 0.1)
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def flood(stream: MessageStream) -> None:
        while not stream.over:
            stream.send(heard("x" * 1_000_000))
            await asyncio.sleep(0.001)
        try:
            await stream.wait_over()
        except StreamLost as error:
            lost.set_result(error)

    async with serving(flood) as server:
        _, writer = await greeted(server)
        writer.transport.pause_reading()
        assert "has read nothing" in str(await lost)
        writer.close()


async def test_what_a_peer_has_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "MAX_UNSENT_BYTES", 20_000_000)

    async def flood(stream: MessageStream) -> None:
        while not stream.over:
            stream.send(heard("x" * 1_000_000))
            most.append(stream._transport.get_write_buffer_size())
            await asyncio.sleep(0)

    most: list[int] = []
    async with serving(flood) as server:
        _, writer = await greeted(server)
        writer.transport.pause_reading()
        while server._streams:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        assert 20_000_000 < max(most) < 22_000_000
        writer.close()


async def test_a_slow_peer_keeps_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "STALL_S", 0.2)
    num_bytes = 20_000_000

    async def say(stream: MessageStream) -> None:
        for _ in range(num_bytes // 1_000_000):
            stream.send(heard("x" * 1_000_000))
        await stream.wait_over()

    async with serving(say) as server:
        reader, writer = await greeted(server)
        left, began = num_bytes, asyncio.get_running_loop().time()
        while left > 0:  # in 1.5 s: some times as long as a peer may read nothing
            left -= len(await reader.readexactly(min(left, 400_000)))
            await asyncio.sleep(0.03)
        assert asyncio.get_running_loop().time() - began > 3 * message_stream.STALL_S
        assert len(server._streams) == 1
        writer.close()


async def test_a_server_that_is_none_is_refused_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await connect(f"127.0.0.1:{port}", SERVICE, TOKEN, pb.Closed.FromString)
    nowhere = ("nowhere", "", ":1", "127.0.0.1:", "[::1", "h:²", "..:80", "a" * 70 + ".b:80", "a\0:80")
    for address in (f"127.0.0.1:{port}", "127.0.0.1:99999", *nowhere):
        with pytest.raises(StreamLost, match="cannot be reached"):
            await connect(address, SERVICE, TOKEN, pb.Closed.FromString)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", framed(os.urandom(32)), framed(b"") * 2 + b"\xff" * 9]
)
async def test_a_server_that_says_something_else_is_left(answer: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    async def hear() -> None:
        await (await connect(f"{host}:{port}", SERVICE, TOKEN, pb.Closed.FromString)).read()

    with pytest.raises(StreamLost):
        await hear()
    server.close()


async def test_stopping_a_server_writes_what_was_sent_and_ends_every_stream() -> None:
    async def say(stream: MessageStream) -> None:
        try:
            await stream.wait_over()
        finally:
            stream.send(heard("goodbye"))

    async with serving(say) as server:
        stream = await client(server)
        frozen = await greeted(server)
    assert (await stream.read()).lease_id == "goodbye"
    assert await stream.read() is None
    frozen[1].close()


async def test_stopping_ends_also_what_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_server, "STOP_GRACE_S", 0.1)

    async def say(stream: MessageStream) -> None:
        for _ in range(20):
            stream.send(heard("x" * 1_000_000))
        full.set()
        await stream.wait_over()

    full = asyncio.Event()
    async with serving(say) as server:
        _, writer = await greeted(server)
        writer.transport.pause_reading()
        await full.wait()
        stream = next(iter(server._streams))
    assert stream.over
    writer.close()


async def test_connections_that_come_while_a_server_stops_are_not_served() -> None:
    for _ in range(20):
        async with serving() as server:
            coming = [asyncio.create_task(raw(server)) for _ in range(5)]
            await asyncio.sleep(0)
        for _, writer in [
            each for each in await asyncio.gather(*coming, return_exceptions=True) if type(each) is tuple
        ]:
            writer.close()
        await asyncio.sleep(0)
        assert not server._streams


@pytest.mark.parametrize(("host", "reached_at"), [("::1", "[::1]"), ("::", "[::1]"), ("::", "127.0.0.1")])
async def test_ipv6_is_served_too(host: str, reached_at: str) -> None:
    server = MessageServer(host, token=TOKEN)
    server.register(SERVICE, pb.Closed.FromString, echo)
    await server.start()
    port = server.address.rpartition(":")[2]
    stream = await connect(f"{reached_at}:{port}", SERVICE, TOKEN, pb.Closed.FromString)
    stream.send(heard("a"))
    assert (await stream.read()).lease_id == "a"
    stream.abort()
    await server.stop()


async def test_dead_peers_are_found_by_the_kernel() -> None:
    async with serving() as server:
        stream = await client(server)
        connection = stream._transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
        stream.abort()


def test_an_open_port_needs_a_token() -> None:
    with pytest.raises(ValueError, match=r"security\.token_file"):
        MessageServer("0.0.0.0", token="")
