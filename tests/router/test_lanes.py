import asyncio
import contextlib
import json
import os
import random
import socket

import pytest

from engine.wire import lone_tokens_to_bytes
from router import lanes as lanes_module
from router.byte_tokenizer import byte_tokenizer
from router.generation import ModelCard
from router.http import Front, FrontConfig
from router.lanes import MAX_AROUND, MAX_KEPT, MAX_TEXT, MAX_VOCABULARIES, EventTexts, Lanes
from router.metrics import Histogram, Metrics
from router.server import BoundedProtocol, ServerConfig, serve
from router.stream import TokenStream
from tests.router.dispatch.cluster import cluster
from tests.router.dispatch.fake_worker import expected_tokens

VOCABULARY = object()


class Events:
    """Events to the one end of a pair of sockets; `shown` reads the other."""

    def __init__(self, texts: EventTexts, before: bytes = b'{"text":', after: bytes = b"}\n\n") -> None:
        self.before, self.after, self.texts, self.piece_at = before, after, texts, 1.0
        self.vocabulary = texts.vocabulary(VOCABULARY)
        self.inter_token = Histogram("h", "", (0.01, 1.0))
        self.num_tokens = 0
        self.rest: list[bytes] = []
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self.descriptor = self._near.fileno()

    def lane_closed(self, num_tokens: int, last_at: float) -> None:
        self.num_tokens, self.piece_at = self.num_tokens + num_tokens, last_at

    def lane_broke(self, rest: bytes) -> None:
        self.rest.append(rest)

    def take(self, token_id: int) -> bool:  # the long way
        self._near.sendall(self.event(b'"%d"' % token_id))
        self.num_tokens += 1
        return True

    def event(self, text: bytes) -> bytes:
        event = self.before + text + self.after
        return b"%x\r\n%b\r\n" % (len(event), event)

    def shown(self) -> bytes:
        return self._far.recv(1 << 20)

    def leave(self) -> None:
        self._far.close()

    def close(self) -> None:
        self._near.close()
        self._far.close()


class Stream:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_closed = 0

    def lane_closed(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.num_closed += 1


@pytest.fixture
def texts() -> EventTexts:
    texts = EventTexts()
    texts.vocabulary(VOCABULARY)
    for token_id in (7, 8, 9):
        texts.learn(0, token_id, b'"%d"' % token_id)
    return texts


@pytest.fixture
def events(texts):
    events = Events(texts)
    yield events
    events.close()


def test_a_lane_writes_what_comes_next_and_its_stream_gets_it_when_it_closes(events):
    lanes, stream = Lanes(), Stream()
    handle = lanes.new_handle()
    assert lanes.open(handle, stream, 3, events.descriptor, events)
    assert list(lanes.route(lone_tokens_to_bytes([(handle, 3, 7), (handle, 4, 8)]), 1.5)) == []
    assert events.shown() == events.event(b'"7"') + events.event(b'"8"')
    assert stream.token_ids == []
    lanes.close(handle)
    lanes.close(handle)
    assert (events.inter_token.counts, events.inter_token.total) == ([1, 1, 0], 0.5)
    assert (stream.token_ids, stream.num_closed, events.num_tokens, events.piece_at) == ([7, 8], 1, 2, 1.5)


def test_other_tokens_go_the_long_way(events):
    lanes, stream = Lanes(), Stream()
    handle, other = lanes.new_handle(), lanes.new_handle()
    assert lanes.open(handle, stream, 0, events.descriptor, events)
    strangers = [
        (other, 0, 7),  # has no lane
        (handle, 1, 7),  # early
        (handle, 0, 5),  # whose text nobody knows
        (handle, 0, 1 << 31),
        (handle + (1 << 20), 0, 7),  # another one's slot
        ((1 << 64) - 1, 0, 7),
        (1 << 19, 0, 7),  # no slot
    ]
    assert list(lanes.route(lone_tokens_to_bytes([*strangers, (handle, 0, 9), (handle, 0, 9)]), 1.0)) == [
        *strangers,
        (handle, 0, 9),  # known
    ]
    assert events.shown() == events.event(b'"9"')
    lanes.close(handle)
    assert lanes.route(lone_tokens_to_bytes([(handle, 1, 7)]), 1.0) == [(handle, 1, 7)]
    with pytest.raises(ValueError, match="are no tokens"):
        lanes.route(b"x" * 17, 1.0)


def test_a_lane_keeps_so_many_tokens(events):
    lanes, stream = Lanes(), Stream()
    handle = lanes.new_handle()
    lanes.open(handle, stream, 0, events.descriptor, events)
    for index in range(MAX_KEPT):
        assert not lanes.route(lone_tokens_to_bytes([(handle, index, 8)]), 1.0)
        assert events.shown() == events.event(b'"8"')
    one_more = (handle, MAX_KEPT, 8)
    assert lanes.route(lone_tokens_to_bytes([one_more]), 1.0) == [one_more]
    lanes.release(handle)
    assert stream.token_ids == [8] * MAX_KEPT


def test_a_lane_breaks_where_the_kernel_takes_no_more(events):
    lanes, stream = Lanes(), Stream()
    handle = lanes.new_handle()
    lanes.open(handle, stream, 0, events.descriptor, events)
    sent = taken = 0
    while not events.rest:
        assert not lanes.route(lone_tokens_to_bytes([(handle, sent, 7)]), 1.0)
        sent += 1
        if sent % MAX_KEPT == 0 and not events.rest:
            lanes.close(handle)
            lanes.open(handle, stream, sent, events.descriptor, events)
    every = sent * events.event(b'"7"')
    while taken + len(events.rest[0]) < len(every):
        taken += len(events.shown())
    assert taken + len(events.rest[0]) == len(every)
    assert stream.token_ids == [7] * sent
    assert lanes.route(lone_tokens_to_bytes([(handle, sent, 7)]), 1.0) == [(handle, sent, 7)]


def test_a_lane_breaks_where_the_client_has_left(events):
    lanes, stream = Lanes(), Stream()
    handle = lanes.new_handle()
    lanes.open(handle, stream, 0, events.descriptor, events)
    events.leave()
    tokens = lone_tokens_to_bytes([(handle, 0, 7), (handle, 1, 7)])
    assert lanes.route(tokens, 1.0) == [(handle, 1, 7)], "no signal ends the process"
    assert (stream.token_ids, events.rest) == ([7], [events.event(b'"7"')])


def test_slots_are_used_again_and_handles_are_not(events):
    lanes = Lanes(num_slots=2)
    handles = [lanes.new_handle() for _ in range(9)]
    streams = [Stream() for _ in handles]
    for index, (handle, stream) in enumerate(zip(handles, streams, strict=True)):
        assert lanes.open(handle, stream, index, events.descriptor, events)
    assert not lanes.route(lone_tokens_to_bytes([(each, index, 7) for index, each in enumerate(handles)]), 1.0)
    for handle in handles:
        lanes.release(handle)
    assert [stream.token_ids for stream in streams] == [[7]] * 9
    later = [lanes.new_handle() for _ in range(9)]
    assert not {*handles} & {*later}
    slots = {handle & 0xFFFFF for handle in handles}
    assert {handle & 0xFFFFF for handle in later} <= slots | set(range(16))
    late = [(handles[0], 1, 7)]
    assert list(lanes.route(lone_tokens_to_bytes(late), 1.0)) == late


def test_what_does_not_fit_has_no_lane(texts):
    lanes, stream = Lanes(), Stream()
    long = Events(texts, before=b"x" * MAX_AROUND)
    assert not lanes.open(lanes.new_handle(), stream, 0, long.descriptor, long)
    long.close()
    texts.learn(0, 20, b"x" * (MAX_TEXT + 1))
    texts.learn(0, 1 << 20, b"x")
    assert not texts.spans[20]
    for _ in range(MAX_VOCABULARIES - 1):
        assert texts.vocabulary([]) > 0
    assert texts.vocabulary([]) == -1
    texts.learn(-1, 3, b"x")
    assert texts.vocabulary(VOCABULARY) == 0


def test_many_texts_are_learned(texts):
    for token_id in range(100, 20_000):
        texts.learn(0, token_id, b'"%d"' % token_id)
    span = int(texts.spans[12_345])
    assert texts.arena[span >> 8 : (span >> 8) + (span & 0xFF)].tobytes() == b'"12345"'


async def test_a_stream_gets_each_token_once_whatever_way_it_comes(texts):
    """Lanes opened and closed at random, tokens repeated, early, in groups; attempts that begin anew elsewhere."""
    rng = random.Random(5)
    for _ in range(40):
        events, lanes = Events(texts), Lanes()
        stream = TokenStream(1000, 0.0, lambda: 0.0)
        wanted, shown, deltas = [rng.choice((5, 7, 8, 9)) for _ in range(60)], b"", []

        def take(delta, events=events, deltas=deltas):
            deltas.append(delta)
            for token_id in delta.token_ids:
                events.take(token_id)
            return delta.finish_reason is None

        forwarding = asyncio.create_task(stream.forward(take, events))
        await asyncio.sleep(0)
        handle, num_sent = lanes.new_handle(), 0
        stream.lane_at(lanes, handle)
        while num_sent < len(wanted):
            match rng.randrange(12):
                case 0:
                    stream.open_lane(events, events.descriptor)
                    stream.open_lane(events, events.descriptor)
                case 1:
                    stream.close_lane()
                case 2:  # another attempt goes on with what came
                    stream.discard_early()
                    lanes.release(handle)
                    assert stream.token_ids == wanted[:num_sent]
                    handle = lanes.new_handle()
                    stream.lane_at(lanes, handle)
                case 3:
                    some = wanted[num_sent : num_sent + 3]
                    stream.accept(num_sent, some, [], None)
                    num_sent += len(some)
                case 4:
                    again = rng.randrange(num_sent + 1)
                    stream.accept_token(again, wanted[again])
                    num_sent = max(num_sent, again + 1)
                case _:
                    token = (handle, num_sent, wanted[num_sent])
                    for _, index, token_id in lanes.route(lone_tokens_to_bytes([token]), 2.0):
                        stream.accept_token(index, token_id)
                    num_sent += 1
            await asyncio.sleep(0)
        stream.accept(num_sent, [9], [], "stop")
        await forwarding
        assert stream.token_ids == [*wanted, 9]
        shown = events.shown()
        assert shown == b"".join(events.event(b'"%d"' % each) for each in [*wanted, 9])
        assert events.num_tokens == len(wanted) + 1
        events.close()


class Serving:
    """The whole router over workers without engines."""

    def __init__(self, port: int, metrics: Metrics) -> None:
        self.port, self.metrics = port, metrics
        self.tokenizer = byte_tokenizer(1009)

    async def connect(self, **options):
        return await asyncio.open_connection("127.0.0.1", self.port, **options)

    def text(self, prompt: list[int], max_tokens: int) -> str:
        decoder = self.tokenizer.decoder(skip_special_tokens=True)
        return decoder.push(expected_tokens(prompt, max_tokens)) + decoder.finish()


def ask(writer: asyncio.StreamWriter, prompt: list[int], max_tokens: int, **fields: object) -> None:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **fields}
    body = json.dumps(fields).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(body)
        + body
    )


async def answer(reader: asyncio.StreamReader) -> dict[int, str]:
    """The texts of a streamed answer, by choice."""
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        await reader.readexactly(2)
    *events, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    shown: dict[int, str] = {}
    for event in events:
        for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
            shown[choice["index"]] = shown.get(choice["index"], "") + choice["text"]
    return shown


@contextlib.asynccontextmanager
async def serving(dispatcher, **options):
    metrics, stop = Metrics("m", dispatcher), asyncio.Event()
    port = asyncio.get_running_loop().create_future()
    front = Front(
        dispatcher,
        ModelCard("model", 1009, 100_000, (0,)),
        byte_tokenizer(1009),
        metrics,
        FrontConfig(**options),
    )
    limits = ServerConfig(drain_s=2)
    task = asyncio.create_task(serve(front, "127.0.0.1", 0, stop=stop, started=port.set_result, config=limits))
    try:
        yield Serving(await port, metrics)
    finally:
        stop.set()
        await task
        front.close()


@pytest.fixture
def by_lane(monkeypatch):
    """How many tokens went by lanes, and how many lanes broke."""
    counts = [0, 0]
    send_tokens = lanes_module.send_tokens

    def counted(tokens, *rest):
        num_left, num_broken = send_tokens(tokens, *rest)
        counts[0] += len(tokens) // 2 - num_left
        counts[1] += num_broken
        return num_left, num_broken

    monkeypatch.setattr(lanes_module, "send_tokens", counted)
    return counts


async def test_streams_of_one_router(by_lane):
    """On kept connections, longer than a lane keeps, with characters of several tokens and tokens seen before."""
    async with cluster() as it, serving(it.dispatcher) as router:

        async def client(number: int) -> None:
            reader, writer = await router.connect()
            for turn in range(3):
                prompt, max_tokens = [number + 1, turn, 3], 300 + 10 * number
                ask(writer, prompt, max_tokens)
                assert await answer(reader) == {0: router.text(prompt, max_tokens)}
            writer.close()

        await asyncio.gather(*map(client, range(8)))
        num_tokens = 3 * sum(300 + 10 * number for number in range(8))
        assert by_lane[0] > 0.3 * num_tokens
        assert router.metrics.generation_tokens == num_tokens
        gaps = router.metrics.inter_token
        assert num_tokens * 0.95 < sum(gaps.counts) <= num_tokens - 3 * 8


async def test_choices_of_one_answer_have_no_lanes(by_lane):
    async with cluster() as it, serving(it.dispatcher) as router:
        reader, writer = await router.connect()
        ask(writer, [1, 2, 3], 50, n=2)
        text = router.text([1, 2, 3], 50)
        assert await answer(reader) == {0: text, 1: text}
        writer.close()
        assert by_lane[0] == 0


async def test_a_worker_that_dies_costs_no_token(by_lane):
    async with cluster(prefill=0, decode=2) as it, serving(it.dispatcher) as router:
        reached, gate = asyncio.Event(), asyncio.Event()

        async def hold(job):
            if job.index == 200 and not gate.is_set():
                reached.set()
                await gate.wait()

        reader, writer = await router.connect()
        ask(writer, [1], 1100)  # every token
        await answer(reader)
        for worker in it.workers.values():
            worker.hooks["token"] = hold
        ask(writer, [5, 6, 7], 400)
        await reached.wait()
        await asyncio.sleep(0.1)
        running = next(worker for worker in it.workers.values() if worker.jobs)
        sent = by_lane[0]
        assert sent > 10
        await running.kill()
        gate.set()
        assert await answer(reader) == {0: router.text([5, 6, 7], 400)}
        assert by_lane[0] > sent
        assert not any(worker.violations for worker in it.workers.values())
        writer.close()


async def test_a_client_that_reads_late_gets_all(by_lane, monkeypatch):
    connection_made = BoundedProtocol.connection_made

    def with_little_room(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection_made(self, transport)

    monkeypatch.setattr(BoundedProtocol, "connection_made", with_little_room)
    async with cluster(prefill=0, decode=1) as it, serving(it.dispatcher) as router:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", router.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2048)
        max_tokens = 3000
        ask(writer, [1], 1100)  # every token
        await answer(reader)
        by_lane[1] = 0
        ask(writer, [5, 6, 7], max_tokens)
        async with asyncio.timeout(60):
            while not by_lane[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert await answer(reader) == {0: router.text([5, 6, 7], max_tokens)}
        writer.close()


async def test_clients_that_leave_leave_nothing_behind(by_lane):
    async with cluster(prefill=0, decode=1) as it, serving(it.dispatcher) as router:
        worker = it.workers["d0"]

        async def slowly(job):
            await asyncio.sleep(0.002 if job.index > 50 else 0)

        worker.hooks["token"] = slowly
        before = len(os.listdir("/proc/self/fd"))
        for round_ in range(3):

            async def leave(number: int) -> None:
                reader, writer = await router.connect()
                ask(writer, [number, 2], 3000)
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(5000 + 500 * number)
                writer.transport.abort() if number % 2 else writer.close()

            async def stay(number: int, round_: int = round_) -> None:
                await asyncio.sleep(0.01 * number)
                reader, writer = await router.connect()
                ask(writer, [number, round_], 150)
                assert await answer(reader) == {0: router.text([number, round_], 150)}
                writer.close()

            await asyncio.gather(*map(leave, range(6)), *map(stay, range(6)))
        async with asyncio.timeout(10):
            while worker.jobs or len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert by_lane[0] > 300
        assert it.dispatcher._lanes._num_open == 0
