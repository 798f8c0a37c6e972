"""The sink of KV in a decode worker: pulls what sources offer into blocks that the worker has reserved.

Used on the worker's asyncio loop. Owns one link for each source worker: made at the first pull, made again when dead,
dropped when idle. Invariant: when `pull` has returned or raised, cancellation included, nothing writes into the
blocks it was given; and it only returns when every byte is in place, and was verified if a CPU touched it, or else
the lease held until then.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import DecodeError

from engine.errors import TransferError
from engine.kv.memory import KvMemory
from kv_transfer.busy_time import BusyTime
from kv_transfer.copier import CopierConfig, make_copier, open_stream, warm_up
from kv_transfer.fingerprint import difference
from kv_transfer.handoff import Handoff, HandoffState
from kv_transfer.link import layer_ranges
from kv_transfer.pull import Pull, Pulled, PullLimits
from kv_transfer.sink_link import CannotRead, Greeting, LinkConfig, SinkLink
from kv_transfer.target import SOURCE_RANK, Target
from kv_transfer.transports.base import Reader, SinkTransport
from protos import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.copy_stream import CopyStream

T = TypeVar("T")

__all__ = ["KvSink", "Pulled", "SinkConfig"]


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """Deadlines in seconds; `copy_threads`, `stage_bytes` and `max_piece_bytes` are for each link.

    A link to KV in device memory takes `copy_threads` stages of `stage_bytes` on the device, unless its transport
    copies straight into place.
    """

    connect_s: float = 5.0  # until the lease is open
    silence_s: float = 2.0  # sources say something at least every half second
    ack_s: float = 5.0  # until the source confirms the lease, where there are no checksums
    idle_s: float = 60.0
    copy_threads: int = 2
    job_bytes: int = 32 << 20  # what a thread copies at a time in host memory
    stage_bytes: int = 32 << 20
    max_failures: int = 2  # times a piece is pulled again
    max_piece_bytes: int = 1 << 30

    def limits(self) -> Mapping[HandoffState, float]:
        return {
            HandoffState.OFFERED: self.connect_s,
            HandoffState.RESERVED: self.connect_s,
            HandoffState.PULLING: float("inf"),  # as long as prefill takes: the pull's own deadline
            HandoffState.READY: self.ack_s,
        }


class KvSink:
    """Made before the worker serves: for device memory it compiles a kernel."""

    def __init__(
        self,
        *,
        worker_id: str,
        memory: KvMemory,
        fingerprint: str,
        token: str,
        transports: Sequence[SinkTransport],
        boot_id: str,
        config: SinkConfig | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config or SinkConfig()
        self._memory = memory
        self._greeting = Greeting(worker_id, fingerprint, memory.layout, boot_id, tuple(transports), token)
        self._clock = clock
        self._links: dict[tuple[str, str], asyncio.Task[SinkLink]] = {}  # by link address and epoch
        self._closed = False
        self._busy = BusyTime()
        warm_up(memory)
        self._copiers = CopierConfig(self._config.job_bytes, self._config.copy_threads, self._config.stage_bytes)

    async def pull(self, offer: bytes, *, block_ids: Sequence[int], num_held_tokens: int, deadline: float) -> Pulled:
        """Fill `block_ids`, which hold the positions from `num_held_tokens` (whole blocks) on.

        `deadline` is a time of the clock. Raise TransferError; nothing can then be said of the blocks' contents.
        """
        handoff = Handoff(self._config.limits(), deadline, self._clock())
        offered = self._parse(offer)
        self._check_blocks(offered, block_ids, num_held_tokens)
        handoff.advance(HandoffState.RESERVED, self._clock())
        link = await self._within(handoff, self._link(offered))
        pull = self._make_pull(link, offered, block_ids, num_held_tokens, handoff)
        link.attach(pull)
        try:
            transport = link.reader.name if link.reader is not None else ""
            token, num_bytes, copy_s, exposed_s = await pull.run()
        finally:
            link.detach(pull)
        link_s = self._busy.take(self._clock())
        return Pulled(token.token_id, token.finished, len(block_ids), num_bytes, copy_s, exposed_s, link_s, transport)

    async def close(self) -> None:
        """End every link; pulls still running fail."""
        self._closed = True
        tasks, self._links = list(self._links.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
        await asyncio.gather(*(link.close() for link in links))

    def _parse(self, offer: bytes) -> pb.KvOffer:
        try:
            offered = pb.KvOffer.FromString(offer)
        except DecodeError as error:
            raise TransferError("the offer is malformed", retryable=False) from error
        if mismatch := difference(self._greeting.fingerprint, offered.fingerprint):
            raise TransferError(f"the source runs something else: {mismatch}", retryable=False)
        return offered

    def _check_blocks(self, offered: pb.KvOffer, block_ids: Sequence[int], num_held_tokens: int) -> None:
        layout = self._memory.layout
        assert num_held_tokens % layout.block_size == 0, (num_held_tokens, layout.block_size)
        if block_ids:
            assert 0 <= min(block_ids) <= max(block_ids) < self._memory.num_blocks, block_ids
        num_blocks = layout.num_blocks_for(offered.num_tokens) - num_held_tokens // layout.block_size
        if not 0 <= num_blocks == len(block_ids):
            raise TransferError(
                f"{len(block_ids)} blocks reserved for an offer that needs {num_blocks}", retryable=False
            )

    async def _within(self, handoff: Handoff, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(handoff.remaining(self._clock())):
                return await work
        except TimeoutError as error:
            raise TransferError("no link to the source in time", retryable=True) from error

    async def _link(self, offered: pb.KvOffer) -> SinkLink:
        """The live link to the offer's worker. Pulls that need it at once share the making of it."""
        key = (offered.link_address, offered.epoch)
        task = self._links.get(key)
        if task is None or (task.done() and not _alive(task)):
            if self._closed:
                raise TransferError("this worker stops", retryable=True)
            self._links = {key: each for key, each in self._links.items() if not each.done() or _alive(each)}
            task = asyncio.create_task(self._connect(offered.link_address))
            task.add_done_callback(_retrieve)
            self._links[key] = task
        link = await asyncio.shield(task)
        if link.epoch != offered.epoch:
            raise TransferError("the source was restarted since it made the offer", retryable=True)
        return link

    async def _connect(self, address: str) -> SinkLink:
        """With the best transport that works from here: not every process that seems near can be read."""
        config = LinkConfig(self._config.silence_s, self._config.idle_s, self._config.copy_threads)
        greeting = self._greeting
        while True:
            try:
                async with asyncio.timeout(self._config.connect_s):
                    return await SinkLink.connect(address, greeting, config, self._open_stream)
            except CannotRead as failure:
                left = [each for each in greeting.transports if each.name != failure.transport]
                if not left:
                    raise failure.error from failure
                greeting = replace(greeting, transports=left)
            except TimeoutError as error:
                raise TransferError("no link to the source in time", retryable=True) from error

    def _open_stream(self, reader: Reader) -> "CopyStream | None":
        return open_stream(self._memory, reader, self._copiers)

    def _make_pull(
        self,
        link: SinkLink,
        offered: pb.KvOffer,
        block_ids: Sequence[int],
        num_held_tokens: int,
        handoff: Handoff,
    ) -> Pull:
        if not link.alive or link.reader is None or link.pulls(offered.lease_id):
            raise TransferError("the link ended, or pulls this lease already", retryable=True)
        target = Target(
            lease_id=offered.lease_id,
            groups=self._check_offer(link, offered),
            source_block_ids=tuple(offered.block_ids),
            sink_block_ids=tuple(block_ids),
            num_tokens=offered.num_tokens,
            num_held_tokens=num_held_tokens,
        )
        return Pull(
            lease_id=offered.lease_id,
            first_block=link.plan.first_block(SOURCE_RANK, num_held_tokens),
            num_blocks=len(offered.block_ids),
            copier=make_copier(link.reader, link.plan, self._memory, target, link.stream, self._config.job_bytes),
            handoff=handoff,
            limits=PullLimits(self._config.copy_threads, self._config.max_failures),
            send=link.send,
            pool=link.pool,
            busy=self._busy,
            clock=self._clock,
        )

    def _check_offer(self, link: SinkLink, offered: pb.KvOffer) -> tuple[range, ...]:
        """Nothing that the offer says may reach outside the memory that the link has agreed on."""
        layout = link.plan.sources[SOURCE_RANK]
        if len(offered.block_ids) != layout.num_blocks_for(offered.num_tokens):
            raise TransferError("the offer has another number of blocks than its tokens need", retryable=True)
        if max(offered.block_ids, default=0) >= link.num_blocks:
            raise TransferError("the offer names blocks that the source does not have", retryable=True)
        try:
            groups = layer_ranges(tuple(offered.layer_groups), layout)
        except ValueError as error:
            raise TransferError(f"the offer is malformed: {error}", retryable=True) from error
        if max(map(len, groups)) * layout.layer_bytes > self._config.max_piece_bytes:
            raise TransferError("the offer's pieces are too large", retryable=True)
        return groups


def _alive(task: "asyncio.Task[SinkLink]") -> bool:
    return not task.cancelled() and task.exception() is None and task.result().alive


def _retrieve(task: "asyncio.Task[SinkLink]") -> None:
    """The pulls that waited have the exception; when all were cancelled nobody has."""
    if not task.cancelled():
        task.exception()
