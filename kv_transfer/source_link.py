"""One link on the source's side: greets the sink, hears what it wants, tells it what is final.

Runs on the asyncio loop; one instance for each stream. What must be shared with the engine thread lives in
KvSource behind its lock; this class keeps the stream going. Life: hello -> serving -> ended, when either side ends
the stream, the sink is silent for a lease's time, or does not read. Leases opened here end
with it.
"""

import asyncio
import logging
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from engine.kv.layout import BlockId
from engine.message_stream import MessageStream, StreamLost
from kv_transfer.checksum import PieceChecksums
from kv_transfer.transports.base import LINK_ID_BYTES
from protos import transfer_pb2 as pb

log = logging.getLogger(__name__)

HELLO_S = 5.0


@dataclass(frozen=True, slots=True)
class Span:
    """Final pieces of consecutive blocks of a lease, of one layer group."""

    layer_group: int
    first_block: int
    block_ids: tuple[BlockId, ...]
    offset: int  # of the piece in its block
    piece_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one announcement says."""

    lease_id: str
    spans: tuple[Span, ...]
    first_token: pb.FirstToken | None  # with the last announcement of the lease


class LinkDesk(Protocol):
    """What a link asks of its source."""

    def welcome(self, link: "SourceLink", hello: pb.Hello) -> pb.HelloReply | None: ...
    def open_lease(self, link: "SourceLink", lease_id: str, first_block: int) -> None: ...
    def renew(self, link: "SourceLink", lease_ids: list[str]) -> None: ...
    def close_lease(self, link: "SourceLink", lease_id: str, pulled: bool) -> None: ...
    def next_work(self, link: "SourceLink") -> Work | None: ...
    def holds(self, lease_id: str) -> bool: ...
    def drop_link(self, link: "SourceLink") -> None: ...


class SourceLink:
    """`checksummed` and `worthwhile_bytes` are its transport's; the source sets them with the greeting."""

    def __init__(
        self, desk: LinkDesk, checksums: PieceChecksums, hasher: Executor, key: bytes, heartbeat_s: float
    ) -> None:
        self.key = key
        self.id = key[:LINK_ID_BYTES]
        self._desk = desk
        self.checksummed = True
        self.worthwhile_bytes = 0
        self._checksums = checksums
        self._hasher = hasher
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._signalled = False  # at most one wake-up is on its way
        self._outbox: deque[pb.SourceMessage] = deque()
        self._ended = False

    def signal(self) -> None:
        """There is something new to say. Any thread, under the source's lock."""
        if not self._signalled and not self._loop.is_closed():
            self._signalled = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def post(self, message: pb.SourceMessage) -> None:
        """Say this before any announcement. Any thread, under the source's lock."""
        self._outbox.append(message)
        self.signal()

    def end(self) -> None:
        """Say what is left to say, then end the stream. On the loop."""
        self._ended = True
        self._wake.set()

    async def serve(self, stream: MessageStream, silence_s: float) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                first = await stream.read()
            if first is None or first.WhichOneof("kind") != "hello":
                return
            reply = self._desk.welcome(self, first.hello)
            if reply is None:
                return
            stream.send(pb.SourceMessage(hello=reply))
            if not reply.refused:
                await self._converse(stream, silence_s)
        except (StreamLost, TimeoutError) as error:
            log.info("link %s lost: %r", self.id.hex()[:8], error)
        finally:
            self._ended = True
            self._desk.drop_link(self)

    async def _converse(self, stream: MessageStream, silence_s: float) -> None:
        """Until one side has nothing more to say."""
        tasks = (
            asyncio.create_task(self._speak(stream)),
            asyncio.create_task(self._listen(stream, silence_s)),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, stream: MessageStream, silence_s: float) -> None:
        while not self._ended:
            async with asyncio.timeout(silence_s):
                message = await stream.read()
            if message is None:
                return
            match message.WhichOneof("kind"):
                case "open":
                    self._desk.open_lease(self, message.open.lease_id, message.open.first_block)
                case "renew":
                    self._desk.renew(self, list(message.renew.lease_ids))
                case "close":
                    self._desk.close_lease(self, message.close.lease_id, message.close.pulled)
                case _:
                    return  # not our protocol

    async def _speak(self, stream: MessageStream) -> None:
        while True:
            self._wake.clear()
            self._signalled = False
            while (message := await self._next_message()) is not None:
                stream.send(message)
            if self._ended:
                return
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._wake.wait()
            except TimeoutError:
                stream.send(pb.SourceMessage(heartbeat=pb.Heartbeat()))

    async def _next_message(self) -> pb.SourceMessage | None:
        while not self._outbox:
            work = None if self._ended else self._desk.next_work(self)
            if work is None:
                return None
            message = await self._announce(work)
            if self._desk.holds(work.lease_id):
                return message
        return self._outbox.popleft()

    async def _announce(self, work: Work) -> pb.SourceMessage:
        """Hash what is final. If the lease ends meanwhile the sums may be of another prompt's bytes: they must not be
        sent, as the sink uses what they fit without asking again. `Closed` tells it."""
        pieces = [
            pb.Pieces(
                layer_group=span.layer_group,
                first_block=span.first_block,
                num_blocks=len(span.block_ids),
                checksums=await self._hash(span) if self.checksummed else (),
            )
            for span in work.spans
        ]
        announcement = pb.Announcement(lease_id=work.lease_id, pieces=pieces, first_token=work.first_token)
        return pb.SourceMessage(announcement=announcement)

    async def _hash(self, span: Span) -> list[int]:
        if len(span.block_ids) * span.piece_bytes < self._checksums.inline_bytes:
            return self._checksums.of(span.block_ids, span.offset, span.piece_bytes)
        return await self._loop.run_in_executor(
            self._hasher, self._checksums.of, span.block_ids, span.offset, span.piece_bytes
        )
