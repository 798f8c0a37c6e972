import asyncio
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from router.bodies import BodyBudget
from router.errors import ApiError, ClientGone
from router.exchange import CONNECTION, MAX_UNSENT_BYTES, Exchange, Send, WriteBatch
from router.server import ClientConnection


async def nothing(*_: Any) -> Any:
    await asyncio.Event().wait()


def exchange_with(connection: Any, send: Send = nothing, batch: WriteBatch | None = None) -> Exchange:
    scope = {"method": "POST", "path": "/", "headers": [], "extensions": {CONNECTION: connection}}
    return Exchange(scope, nothing, send, lambda: "id", batch or WriteBatch())


def make_exchange(write: Callable[[bytes], bool], send: Send, batch: WriteBatch) -> Exchange:
    return exchange_with(SimpleNamespace(write=write), send, batch)


async def test_events_do_not_overtake_those_that_a_flush_holds() -> None:
    wire: list[bytes] = []
    room, asked = asyncio.Event(), asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            asked.set()
            await room.wait()  # as uvicorn, which drains before it writes
        wire.append(message.get("body", b"head "))

    def write(events: bytes) -> bool:
        wire.append(events)
        return True

    exchange = make_exchange(write, send, WriteBatch())
    assert not exchange.write_events(b"a1 ")
    first = asyncio.create_task(exchange.flush())
    await asked.wait()
    assert not exchange.write_events(b"b1 ")  # of another choice
    room.set()
    await first
    await exchange.flush()
    assert exchange.write_events(b"b2 ")
    await asyncio.sleep(0)
    assert b"".join(wire) == b"head a1 b1 b2 "


async def test_events_of_one_turn_of_the_loop_are_written_together_at_its_end() -> None:
    wire: list[tuple[str, bytes]] = []
    keeps_up = True

    def make(name: str) -> Exchange:
        async def send(message: Any) -> None:
            if message.get("body"):
                wire.append((name, message["body"]))

        def write(events: bytes) -> bool:
            wire.append((name, events))
            return keeps_up

        return make_exchange(write, send, batch)

    batch = WriteBatch()
    one, two = make("one"), make("two")
    await one.flush()
    await two.flush()
    assert one.write_events(b"a")
    assert two.write_events(b"b")
    assert one.write_events(b"c")
    assert not wire
    await asyncio.sleep(0)
    assert wire == [("one", b"ac"), ("two", b"b")]
    assert one.write_events(b"d")
    await one.end_events(b"e")  # in the same turn: takes them along
    assert not two.write_events(b"x" * MAX_UNSENT_BYTES)
    keeps_up = False
    await asyncio.sleep(0)
    assert wire[2:] == [("one", b"de"), ("two", b"x" * MAX_UNSENT_BYTES)]
    assert not two.write_events(b"y")  # its client does not keep up
    await asyncio.sleep(0)
    assert len(wire) == 4
    await two.flush()
    assert wire[4] == ("two", b"y")


async def test_a_connection_that_cannot_be_written_to_holds_up_no_other() -> None:
    wire: list[bytes] = []
    batch = WriteBatch()

    async def send(message: Any) -> None:
        wire.append(message.get("body", b"head "))

    def broken(_: bytes) -> bool:
        raise RuntimeError("closed")

    one = make_exchange(broken, send, batch)
    two = make_exchange(lambda events: wire.append(events) is None, send, batch)
    await one.flush()
    await two.flush()
    wire.clear()
    assert one.write_events(b"a")
    assert two.write_events(b"b")
    await asyncio.sleep(0)
    assert wire == [b"b"]
    assert not one.write_events(b"c")
    await one.flush()
    assert wire == [b"b", b"ac"]


async def test_a_refused_body_is_dropped_before_its_error_is_answered() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    scope = {"method": "POST", "path": "/", "headers": [], "extensions": {CONNECTION: client()}}
    exchange = Exchange(scope, receive, nothing, lambda: "id", WriteBatch())
    tracemalloc.start()
    with pytest.raises(ApiError) as error, BodyBudget(8 << 20, 0).share() as share:
        await exchange.read_json(32 << 20, 20, share)
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert error.value.status == 503
    assert left < 2 << 20  # the last part


def client() -> ClientConnection:
    return ClientConnection(cast(asyncio.Transport, None), -1)  # nothing is written to it


async def answer_until_gone(exchange: Exchange) -> None:
    with exchange.bounded(60):
        await asyncio.Event().wait()


@pytest.mark.parametrize("before", [False, True])
async def test_a_client_that_leaves_ends_what_answers_it(before: bool) -> None:
    connection = client()
    if before:
        connection.leave()
    answering = asyncio.create_task(answer_until_gone(exchange_with(connection)))
    await asyncio.sleep(0)
    if not before:
        connection.leave()
    with pytest.raises(ClientGone):
        await answering
    assert connection.on_lost is None


async def test_cancelling_an_answer_is_no_clients_leaving() -> None:
    answering = asyncio.create_task(answer_until_gone(exchange_with(connection := client())))
    await asyncio.sleep(0)
    answering.cancel()
    connection.leave()  # in the same turn: the cancellation from outside still counts
    with pytest.raises(asyncio.CancelledError):
        await answering


async def test_an_answer_that_takes_too_long_is_ended() -> None:
    connection = client()
    with pytest.raises(TimeoutError), exchange_with(connection).bounded(0.01):
        await asyncio.Event().wait()
    assert connection.on_lost is None
    await asyncio.sleep(0)  # nothing is left of the cancellation


async def test_an_error_while_an_answer_is_ended_leaves_no_cancellation() -> None:
    async def fail() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError

    with pytest.raises(ValueError), exchange_with(client()).bounded(0.01):  # noqa: PT011 - it says nothing
        await fail()
    answering = asyncio.current_task()
    assert answering is not None
    assert answering.cancelling() == 0


async def test_time_that_passes_after_an_answer_ends_nothing() -> None:
    with exchange_with(client()).bounded(0.01):
        pass
    await asyncio.sleep(0.03)


async def test_the_first_reason_to_end_an_answer_counts() -> None:
    connection = client()
    asyncio.get_running_loop().call_soon(connection.leave)
    asyncio.get_running_loop().call_soon(time.sleep, 0.02)  # both are due when the loop goes on
    with pytest.raises(ClientGone), exchange_with(connection).bounded(0.01):
        await asyncio.Event().wait()


async def test_a_client_that_leaves_after_its_answer_ends_nothing() -> None:
    connection = client()
    with exchange_with(connection).bounded(60):
        pass
    connection.leave()
    await asyncio.sleep(0)
