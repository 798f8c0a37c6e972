import asyncio
from typing import Any

from router.exchange import WRITE_CHUNK, Exchange


async def test_events_do_not_overtake_those_that_a_flush_holds() -> None:
    wire: list[bytes] = []
    room, asked = asyncio.Event(), asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            asked.set()
            await room.wait()  # as uvicorn, which drains before it writes
        wire.append(message.get("body", b"head "))

    async def receive() -> Any:
        await asyncio.Event().wait()

    def write(events: bytes) -> bool:
        wire.append(events)
        return True

    scope = {"method": "POST", "path": "/", "headers": [], "extensions": {WRITE_CHUNK: write}}
    exchange = Exchange(scope, receive, send, lambda: "id")
    assert not exchange.write_events(b"a1 ")
    first = asyncio.create_task(exchange.flush())
    await asked.wait()
    assert not exchange.write_events(b"b1 ")  # of another choice
    room.set()
    await first
    await exchange.flush()
    assert exchange.write_events(b"b2 ")
    assert b"".join(wire) == b"head a1 b1 b2 "
