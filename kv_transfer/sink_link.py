"""One link on the sink's side: the stream to one source worker, shared by every pull from it.

Made and dropped by KvSink, on the asyncio loop. Life: connect (hello, transport) -> alive -> dead, when the source is
silent for too long, the stream ends, or nothing was pulled for a while. A dead link never comes back: its pulls fail,
and the next one makes a new link. Copy threads belong to the link, so a source that stalls holds up nobody else.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import TransferError
from engine.kv.layout import KvLayout
from engine.message_stream import MessageStream, StreamLost
from engine.message_stream import connect as connect_stream
from kv_transfer.link import SERVICE, layout_from_message, layout_to_message
from kv_transfer.plan import TransferPlan, plan_transfer
from kv_transfer.pull import Pull
from kv_transfer.transports.base import Reader, SinkTransport
from protos import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.copy_stream import CopyStream

log = logging.getLogger(__name__)

Opened = tuple[Reader, "CopyStream | None"]
OpenStream = Callable[[Reader], "CopyStream | None"]

SILENT_TICKS = 8


@dataclass(frozen=True, slots=True)
class LinkConfig:
    silence_s: float  # without any message: the link is dead
    idle_s: float  # without any pull: the link is not needed
    copy_threads: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a sink says of itself, and how it can read."""

    worker_id: str
    fingerprint: str
    layout: KvLayout
    boot_id: str
    transports: Sequence[SinkTransport]  # best first
    token: str


class CannotRead(Exception):
    """The transport that the source chose does not work from here: another one may."""

    def __init__(self, transport: str, error: TransferError) -> None:
        super().__init__(str(error))
        self.transport = transport
        self.error = error


class SinkLink:
    """`open_stream` is called with the link's reader, in a thread, and raises TransferError like `connect`."""

    def __init__(self, messages: MessageStream, config: LinkConfig, open_stream: OpenStream) -> None:
        self._messages = messages
        self._config = config
        self._open_stream = open_stream
        self._pulls: dict[str, Pull] = {}
        self._conversation: asyncio.Task[None] | None = None
        self._idle_since = asyncio.get_running_loop().time()
        self.pool = ThreadPoolExecutor(config.copy_threads, thread_name_prefix="kv-copy")
        self.alive = False
        self.epoch = ""
        self.num_blocks = 0
        self.plan: TransferPlan
        self.reader: Reader | None = None
        self.stream: CopyStream | None = None  # where the sink's memory is a device's
        self._closing: Future[None] | None = None
        self._unused = asyncio.Event()  # dead, and every pull has detached
        self._lease_s = 0.0
        self._num_silent_ticks = 0

    @staticmethod
    async def connect(address: str, greeting: Greeting, config: LinkConfig, open_stream: OpenStream) -> "SinkLink":
        """Raise TransferError when refused, CannotRead when only the transport failed. The caller sets the deadline."""
        try:
            messages = await connect_stream(address, SERVICE, greeting.token, pb.SourceMessage.FromString)
        except StreamLost as error:
            raise TransferError(f"no link to the source: {error}", retryable=True) from error
        link = SinkLink(messages, config, open_stream)
        try:
            await link._greet(greeting)
        except BaseException as error:
            await link.close()
            if isinstance(error, StreamLost):
                raise TransferError(f"no link to the source: {error}", retryable=True) from error
            raise
        link.alive = True
        link._conversation = asyncio.create_task(link._converse())
        return link

    def attach(self, pull: Pull) -> None:
        assert pull.lease_id not in self._pulls, pull.lease_id
        self._pulls[pull.lease_id] = pull

    def detach(self, pull: Pull) -> None:
        """When no copy of the pull runs any more."""
        del self._pulls[pull.lease_id]
        self._idle_since = asyncio.get_running_loop().time()
        self._release_when_unused()

    def pulls(self, lease_id: str) -> bool:
        return lease_id in self._pulls

    def send(self, message: pb.SinkMessage) -> None:
        self._messages.send(message)

    async def close(self) -> None:
        """Its pulls fail. Afterwards none of their copies runs any more, and nothing of the source is mapped."""
        self._die("the link was closed")
        if self._conversation is not None:
            self._conversation.cancel()
            await asyncio.wait((self._conversation,))
        self._messages.abort()
        await self._unused.wait()  # copies look at their stop, and have deadlines of their own
        if self._closing is not None:
            await asyncio.wrap_future(self._closing)

    async def _converse(self) -> None:
        tasks = [asyncio.create_task(part) for part in (self._listen(), self._renew(), self._watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._die("the link ended")
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    log.warning("link to source %s: %r", self.epoch, result)
            self._messages.abort()

    async def _greet(self, greeting: Greeting) -> None:
        hello = pb.Hello(
            worker_id=greeting.worker_id,
            fingerprint=greeting.fingerprint,
            layout=layout_to_message(greeting.layout),
            transports=[transport.name for transport in greeting.transports],
            boot_id=greeting.boot_id,
        )
        self._messages.send(pb.SinkMessage(hello=hello))
        message = await self._messages.read()
        if message is None or message.WhichOneof("kind") != "hello":
            raise TransferError("the source did not greet", retryable=True)
        reply = message.hello
        if reply.refused:
            raise TransferError(f"the source refused the link: {reply.refused[:500]}", retryable=False)
        try:
            source = layout_from_message(reply.layout)
            self.plan = plan_transfer([source], greeting.layout)
        except ValueError as error:
            raise TransferError(f"the source's layout does not fit: {error}", retryable=False) from error
        if reply.num_blocks < 1 or reply.lease_ms < 1:
            raise TransferError("the source's greeting is malformed", retryable=True)
        self.epoch, self.num_blocks, self._lease_s = reply.epoch, reply.num_blocks, reply.lease_ms / 1e3
        transport = next((each for each in greeting.transports if each.name == reply.transport), None)
        if transport is None:
            raise TransferError("the source chose a transport that was not offered", retryable=True)
        size = reply.num_blocks * source.block_bytes
        self.reader, self.stream = await self._open_reader(transport, reply, size)

    async def _open_reader(self, transport: SinkTransport, reply: pb.HelloReply, size: int) -> Opened:
        def connect() -> Opened:
            reader = transport.connect(reply.transport_address, reply.transport_key, size)
            try:
                return reader, self._open_stream(reader)
            except BaseException:
                reader.close()
                raise

        opening = asyncio.create_task(asyncio.to_thread(connect))
        try:
            return await asyncio.shield(opening)
        except TransferError as error:
            raise CannotRead(transport.name, error) from error
        except asyncio.CancelledError:
            opening.add_done_callback(_discard)
            raise

    async def _listen(self) -> None:
        self._messages.deliver_to(self._hear)
        try:
            await self._messages.wait_over()  # _watch is its deadline
            self._die("the source ended the link")
        except StreamLost as error:
            self._die(f"the link to the source broke: {error}")

    async def _watch(self) -> None:
        """Silence is counted in ticks: when this process itself stood still, that is one tick, not many."""
        while self._num_silent_ticks < SILENT_TICKS:
            await asyncio.sleep(self._config.silence_s / SILENT_TICKS)
            self._num_silent_ticks += 1
        self._die(f"the source was silent for {self._config.silence_s} s")

    def _hear(self, message: pb.SourceMessage) -> None:
        self._num_silent_ticks = 0
        match message.WhichOneof("kind"):
            case "announcement":
                if (pull := self._pulls.get(message.announcement.lease_id)) is not None:
                    pull.announced(message.announcement)
            case "closed":
                if (pull := self._pulls.get(message.closed.lease_id)) is not None:
                    pull.closed(message.closed)

    async def _renew(self) -> None:
        """The leases of all pulls together, which also tells the source that we live."""
        loop = asyncio.get_running_loop()
        while self._pulls or loop.time() - self._idle_since <= self._config.idle_s:
            await asyncio.sleep(self._lease_s / 3)
            self.send(pb.SinkMessage(renew=pb.Renew(lease_ids=list(self._pulls))))

    def _die(self, reason: str) -> None:
        """Idempotent. Pulls hear of it and detach when their copies have stopped."""
        self.alive = False
        for pull in list(self._pulls.values()):
            pull.lost(reason)
        self._release_when_unused()

    def _release_when_unused(self) -> None:
        if not self.alive and not self._pulls:
            self._unused.set()
            reader, stream, self.reader, self.stream = self.reader, self.stream, None, None
            if reader is not None and stream is not None:
                self._closing = self.pool.submit(reader.close)  # unmapping device memory may wait for the device
            elif reader is not None:
                reader.close()
            self.pool.shutdown(wait=False)


def _discard(opening: "asyncio.Task[Opened]") -> None:
    """A reader that came after its link was given up. To close it may wait for the device or for the peer."""
    if not opening.cancelled() and opening.exception() is None:
        reader, _ = opening.result()
        opening.get_loop().run_in_executor(None, reader.close)
