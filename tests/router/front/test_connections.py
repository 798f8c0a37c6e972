"""What clients may do with a connection: send ahead, leave, not read, offer another protocol, outlive draining."""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from engine.request import FinishReason, Request
from router.generation import Delta, GenerationFailed, Overloaded
from router.server import MAX_AHEAD_BYTES, BoundedProtocol, ClientConnection, DescriptorWatch, ServerConfig
from router.tokenizer import Tokenizer
from tests.router.front.fakes import Step, read_answer, running, saying, until

LIVE = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


def completion(extra: bytes = b"", **fields: Any) -> bytes:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (extra, len(body), body)


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> list[BoundedProtocol]:
    """The server's end of each connection. The kernel takes little of what it writes."""
    made = BoundedProtocol.connection_made
    seen = []

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)
        seen.append(self)

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    return seen


class Recorded:
    """A transport that keeps what is written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[bytes]]:
    """What the server has written to its last connection."""
    made, os_write = BoundedProtocol.connection_made, os.write
    seen: dict[int, Recorded] = {}

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        recorded = Recorded(transport)
        seen.clear()
        seen[transport.get_extra_info("socket").fileno()] = recorded
        made(self, cast(asyncio.Transport, recorded))

    def write(descriptor: int, data: bytes) -> int:
        if descriptor in seen:
            seen[descriptor].writes.append(data)
        return os_write(descriptor, data)

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    monkeypatch.setattr("router.server.os.write", write)
    return lambda: next(iter(seen.values())).writes


async def test_a_stream_is_written_once_for_each_token(tokenizer: Tokenizer, writes: Callable[[], list[bytes]]) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    script = [step for gate in gates for step in (gate, Delta([5], []))]
    script[-1] = Delta([5], [], FinishReason.STOP)
    async with running(tokenizer, lambda _request: script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion(b"Connection: close\r\n", stream=True))
        for number, gate in enumerate(gates, 1):
            gate.set()
            await until(lambda number=number: len(writes()) == number)
        _, _, body = await read_answer(reader)
        writer.close()
    assert all(b"data: {" in each for each in writes())
    assert writes()[0].startswith(b"HTTP/1.1 200")
    assert writes()[2].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"".join(writes()).count(b"data: {") == body.count(b"data: {") == 3


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_parts_that_the_kernel_has_no_room_for_arrive_whole_and_in_order(run: Callable[[Any], None]) -> None:
    parts = [b"%d" % number * size for number, size in enumerate((3_000_000, *range(1, 200)))]

    async def write_all() -> None:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
                made.set_result(cast(asyncio.Transport, transport))

        server = await loop.create_server(Server, "127.0.0.1", 0)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.sockets[0].getsockname())
            client.setblocking(False)
            transport = await made
            connection = ClientConnection(transport, transport.get_extra_info("socket").fileno())
            expected = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
            for _ in range(2):  # the second time with room again
                assert not transport.get_write_buffer_size()
                assert connection.write(parts[0])
                assert transport.get_write_buffer_size()
                received = bytearray(client.recv(1 << 20))  # now the kernel has room before the transport knows
                assert all(connection.write(part) for part in parts[1:])
                while len(received) < len(expected):
                    received += await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 20)
                assert received == expected
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        for _ in range(3):
            connection.write(parts[1])
        await until(transport.is_closing)
        server.close()

    run(write_all())


async def test_the_last_events_of_several_choices_are_all_written(
    tokenizer: Tokenizer, writes: Callable[[], list[bytes]]
) -> None:
    gate = asyncio.Event()
    last = Delta([5], [], FinishReason.STOP)
    scripts = iter([[Delta([5], []), last], [gate, last]])
    async with running(tokenizer, lambda _request: next(scripts)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion(b"Connection: close\r\n", stream=True, n=2))
        await until(lambda: any(b'"finish_reason":"stop"' in each for each in writes()))  # does not wait for the other
        gate.set()
        _, _, body = await read_answer(reader)
        writer.close()
    assert body.count(b'"finish_reason":"stop"') == 2


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (LIVE, [b"HTTP/1.1 200 OK"]),
        (LIVE.replace(b"GET", b"HEAD"), [b"HTTP/1.1 200 OK"]),
        (LIVE.replace(b"live", b"nothing"), [b"HTTP/1.1 404 Not Found"]),
        (completion(), [b"HTTP/1.1 200 OK"]),
        (completion(b"Expect: 100-continue\r\n"), [b"HTTP/1.1 100 Continue", b"HTTP/1.1 200 OK"]),
    ],
)
async def test_a_whole_answer_is_one_write(
    tokenizer: Tokenizer, writes: Callable[[], list[bytes]], request_: bytes, expected: list[bytes]
) -> None:
    async with running(tokenizer, lambda _request: [Delta([5], [], FinishReason.STOP)]) as server:
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request_)
            for _ in expected:
                await reader.readuntil(b"\r\n\r\n")
            writer.close()
    assert [each.partition(b"\r\n")[0] for each in writes()] == expected


@pytest.mark.parametrize("ahead", [LIVE, LIVE[:9], completion(prompt="x" * 70_000), LIVE * 9000])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_sends_ahead_and_leaves_cancels_its_generation(
    tokenizer: Tokenizer, stream: bool, ahead: bytes
) -> None:
    async with running(tokenizer, lambda _request: [Delta([5], []), asyncio.Event()]) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion(stream=stream))
        await until(lambda: server.metrics.num_running)
        writer.write(ahead)
        await writer.drain()
        writer.close()
        await until(lambda: server.metrics.responses)
        assert server.generator.streams[0].closed.is_set()
    assert +server.metrics.finished == {"abort": 1}


async def test_a_client_that_leaves_after_a_large_body_cancels_its_generation(
    tokenizer: Tokenizer, protocols: list[BoundedProtocol]
) -> None:
    head, _, body = completion(user="u" * 200_000).partition(b"\r\n\r\n")
    async with running(tokenizer, lambda _request: [asyncio.Event()]) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + b"\r\n\r\n" + body[:100])
        await until(lambda: protocols and protocols[0].cycle and not protocols[0].cycle.body)  # it waits for more
        protocols[0].data_received(body[100:])  # as one packet
        await until(lambda: server.generator.streams)
        writer.close()
        async with asyncio.timeout(20):
            await server.generator.streams[0].closed.wait()


async def test_requests_of_a_client_that_has_left_end_in_silence(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tokenizer, lambda _request: [asyncio.Event()]) as server:
        for _ in range(2):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(completion() * 2)
            await until(lambda: server.metrics.num_waiting)
            writer.transport.abort()
            await until(lambda: not server.metrics.num_waiting)
        await until(lambda: server.metrics.responses["/v1/completions", 499] == 2)
    assert not caplog.records


async def test_what_was_sent_ahead_is_answered_in_its_turn(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    async with running(tokenizer, lambda _request: [gate, Delta([5], [], FinishReason.STOP)]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion() + LIVE)  # one packet
        await until(lambda: server.metrics.num_waiting)
        for part in (completion(echo=True)[:9], completion(echo=True)[9:] + LIVE, LIVE[:9], LIVE[9:]):
            writer.write(part)
            await asyncio.sleep(0)
        gate.set()
        answers = [json.loads((await read_answer(reader))[2]) for _ in range(5)]
        writer.close()
    assert ["status" if "status" in answer else "choices" for answer in answers] == [
        "choices",
        "status",
        "choices",
        "status",
        "status",
    ]


async def test_a_connection_on_which_too_much_is_sent_ahead_ends_with_the_answer_under_way(
    tokenizer: Tokenizer, protocols: list[BoundedProtocol]
) -> None:
    gate = asyncio.Event()
    async with running(tokenizer, lambda _request: [gate, Delta([5], [], FinishReason.STOP)]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion())
        await until(lambda: server.metrics.num_waiting)
        protocols[0].data_received(b" " * MAX_AHEAD_BYTES)
        assert protocols[0].cycle.keep_alive
        protocols[0].data_received(LIVE)
        gate.set()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


@pytest.mark.parametrize("kind", ["kept", "closing", "failing"])
async def test_a_client_that_does_not_read_the_end_of_its_answer_is_cut_off(
    tokenizer: Tokenizer, protocols: list[BoundedProtocol], kind: str
) -> None:
    def script(_request: Request) -> list[Step]:
        end = GenerationFailed("x") if kind == "failing" else Delta([5], [], FinishReason.STOP)
        return [Delta([5], []), Delta(long, []), end]

    long = tokenizer.encode("sea " * 10_000)  # less than what makes writing pause
    limits = ServerConfig(stall_s=0.05, idle_s=0.05, drain_s=20)
    async with running(tokenizer, script, limits=limits) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            extra = b"connection: close\r\n" if kind == "closing" else b""
            client.sendall(completion(extra, stream=kind == "failing"))
            await until(lambda: server.metrics.responses)
            assert protocols[0].transport.get_write_buffer_size()
            await until(lambda: not protocols[0].connections)


@pytest.mark.parametrize("cut", ["nowhere", "before the body", "behind the offer", "everywhere", "behind another"])
async def test_an_offer_of_another_protocol_is_ignored(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    whole = completion(OFFER, max_tokens=2)
    middle = whole.index(b"\r\n\r\n") + 4 if cut == "before the body" else whole.index(OFFER) + len(OFFER)
    parts = [whole[:middle], whole[middle:]]
    if cut == "nowhere":
        parts = [whole]
    elif cut == "everywhere":
        parts = [whole[i : i + 1] for i in range(len(whole))]
    elif cut == "behind another":
        parts = [LIVE + whole + LIVE.replace(b"\r\n\r\n", b"\r\n" + OFFER + b"\r\n") + LIVE]
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for part in parts:
            writer.write(part)
            await until(lambda: not writer.transport.get_write_buffer_size())
            await asyncio.sleep(0)
        answers = [await read_answer(reader) for _ in range(4 if cut == "behind another" else 1)]
        writer.close()
    assert [status for status, _, _ in answers] == [200] * len(answers)
    assert any(b"fine" in body for _, _, body in answers)
    assert not caplog.records


async def test_a_tunnel_is_refused(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        answer = await server.raw(b"CONNECT a:1 HTTP/1.1\r\nhost: x\r\n\r\n" + LIVE)
    assert answer[0] == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_outlive_draining_are_told_so(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    end = asyncio.Event()

    def script(_request: Request) -> list[Step]:
        return [Delta([5], []), end, Overloaded("the router is shutting down", retry_after=1.0, unavailable=True)]

    async def give_up() -> None:
        end.set()

    limits = ServerConfig(drain_s=30, farewell_s=30)
    async with running(tokenizer, script, limits=limits, give_up=give_up) as server:
        call = asyncio.create_task(server.post("/v1/completions", {"prompt": "x", "stream": stream}))
        await until(lambda: server.metrics.num_running)
    status, headers, answer = await call
    if stream:
        assert (status, answer[-5:]) == (200, b"<cut>")
        assert b"the router is shutting down" in answer.split(b"\n\n")[-2]
    else:
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"]["message"] == "the router is shutting down"
    assert "Exception in ASGI application" not in caplog.text


async def test_a_connection_that_outlives_draining_is_cut_without_an_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, protocols: list[BoundedProtocol]
) -> None:
    limits = ServerConfig(drain_s=0.05, farewell_s=0.05)
    async with running(tokenizer, saying(tokenizer, "fine"), limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(completion()[:-1])
        await until(lambda: protocols and protocols[0].cycle)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    assert server.metrics.responses["/v1/completions", 499] == 1
    assert not caplog.records


def test_few_descriptors_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = DescriptorWatch(1000)
    for descriptor in (899, 900, 20, 950):
        watch.opened(descriptor)
    assert [record.args for record in caplog.records] == [(900,)]


async def test_connections_are_watched_for_their_descriptors(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tokenizer, saying(tokenizer, "x"), limits=ServerConfig(drain_s=1, max_descriptors=1)) as server:
        assert [(await server.get("/live"))[0] for _ in range(2)] == [200, 200]
    assert caplog.text.count("file descriptors are open") == 1
