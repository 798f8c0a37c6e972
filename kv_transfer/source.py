"""The source of KV in a prefill worker: leases blocks to sinks and announces them as they become final.

`open`, `announce`, `finish` and `abort` are called from the engine thread: they take a short lock, never wait for the
network, and wake the link's task. The links (SourceLink) and the timer that expires leases run on the asyncio
loop; sending transports ask for blocks from threads of their own. All state is behind the one lock.

Invariants: the blocks given to `open` belong to the lease until `on_released` is called for it, which happens exactly
once, from any thread, outside the lock, and never while a sender reads them. Nothing is hashed for nobody: only
blocks that a sink which opened the lease has asked for.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic

from engine.kv.layout import BlockId
from engine.kv.memory import HostMemory, KvMemory
from engine.message_server import MessageServer
from engine.message_stream import MessageStream
from kv_transfer.checksum import HostChecksums, PieceChecksums
from kv_transfer.fingerprint import difference
from kv_transfer.lease import LeaseTable
from kv_transfer.link import SERVICE, layer_ranges, layout_from_message, layout_to_message
from kv_transfer.plan import plan_transfer
from kv_transfer.source_link import SourceLink, Span, Work
from kv_transfer.transports.base import LINK_KEY_BYTES, ServerTransport
from protos import transfer_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """`announce_bytes`: how much one announcement with checksums covers at most, so that a sink can start before all
    is hashed."""

    lease_s: float = 30.0
    max_lease_s: float = 600.0  # however often renewed
    max_leases: int = 1024
    max_links: int = 256
    heartbeat_s: float = 0.5
    announce_bytes: int = 128 << 20


@dataclass(slots=True)
class _Held:
    """What is known of one lease that has not ended."""

    lease_id: str
    block_ids: list[BlockId]
    num_final: list[int]  # for each layer group
    num_announced: list[int] = field(default_factory=list)
    first_token: pb.FirstToken | None = None
    link: SourceLink | None = None

    @property
    def all_announced(self) -> bool:
        return min(self.num_announced) == len(self.block_ids)


class KvSource:
    """`layer_groups`: exclusive end layers, ascending, as the executor has them."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        memory: KvMemory,
        layer_groups: Sequence[int],
        fingerprint: str,
        link_address: str,
        transports: Sequence[ServerTransport],
        on_released: Callable[[str, list[BlockId]], None],
        config: SourceConfig | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config or SourceConfig()
        self._worker_id = worker_id
        self._epoch = epoch
        self._memory = memory
        self._layer_groups = tuple(layer_groups)
        self._groups = layer_ranges(self._layer_groups, memory.layout)
        self._fingerprint = fingerprint
        self._link_address = link_address
        self._transports = {transport.name: transport for transport in transports}
        self._on_released = on_released
        self._clock = clock
        self._lock = Lock()
        self._leases = LeaseTable(
            lease_s=self._config.lease_s, max_lease_s=self._config.max_lease_s, max_leases=self._config.max_leases
        )
        self._held: dict[str, _Held] = {}
        self._links: dict[bytes, SourceLink] = {}
        self._dirty: dict[SourceLink, dict[str, None]] = {}  # leases with something to announce, in order
        self._num_opened = 0
        self._checksums = _checksums_of(memory)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="kv-checksum")
        self._timer: asyncio.Task[None] | None = None
        for transport in transports:
            transport.start(self)

    # The engine's side.

    def open(
        self, request_id: str, block_ids: Sequence[BlockId], num_tokens: int, num_final_blocks: int = 0
    ) -> tuple[str, bytes] | None:
        """Lease the blocks of a prompt: (lease id, serialized KvOffer), or None when there are too many leases.

        `block_ids` are all the prompt's blocks in order; the first `num_final_blocks` are final already.
        """
        assert len(block_ids) == self._memory.layout.num_blocks_for(num_tokens), (len(block_ids), num_tokens)
        assert 0 <= num_final_blocks <= len(block_ids), (num_final_blocks, len(block_ids))
        with self._lock:
            self._num_opened += 1
            lease_id = f"{request_id}#{self._num_opened}"
            if not self._leases.add(lease_id, block_ids, self._clock()):
                return None
            final = [num_final_blocks] * len(self._groups)
            self._held[lease_id] = _Held(lease_id, list(block_ids), final)
        offer = pb.KvOffer(
            lease_id=lease_id,
            worker_id=self._worker_id,
            epoch=self._epoch,
            fingerprint=self._fingerprint,
            link_address=self._link_address,
            num_tokens=num_tokens,
            block_ids=block_ids,
            layer_groups=self._layer_groups,
        )
        return lease_id, offer.SerializeToString()

    def announce(self, lease_id: str, layer_group: int, num_final_blocks: int) -> None:
        """Blocks [0, num_final_blocks) of this group will not change any more. Ignored when the lease has ended."""
        with self._lock:
            held = self._held.get(lease_id)
            if held is None or num_final_blocks <= held.num_final[layer_group]:
                return
            assert num_final_blocks <= len(held.block_ids), (num_final_blocks, len(held.block_ids))
            held.num_final[layer_group] = num_final_blocks
            self._mark(held)

    def finish(self, lease_id: str, first_token: int, finished: bool) -> None:
        """Everything is final, a last block that is not full included. `finished`: nothing is left to decode."""
        with self._lock:
            held = self._held.get(lease_id)
            if held is None:
                return
            assert held.first_token is None, lease_id
            if finished and held.link is None:  # nobody has come for it, and nobody needs to
                self._end(lease_id, "the request ended with its first token")
            else:
                held.num_final = [len(held.block_ids)] * len(self._groups)
                held.first_token = pb.FirstToken(token_id=first_token, finished=finished)
                self._mark(held)
        self._hand_back()

    def abort(self, lease_id: str, reason: str) -> None:
        """Take the offer back; its sink is told at once. Ignored when the lease has ended."""
        with self._lock:
            self._end(lease_id, reason)
        self._hand_back()

    # The rim.

    def register(self, server: MessageServer) -> None:
        """Serve links there, and start expiring leases. Call on the server's loop."""
        server.register(SERVICE, pb.SinkMessage.FromString, self._serve_link)
        self._timer = asyncio.get_running_loop().create_task(self._expire_leases())

    async def close(self) -> None:
        """End every lease and link. The memory may be closed afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        with self._lock:
            for lease_id in list(self._held):
                self._end(lease_id, "the worker stops")
            links = list(self._links.values())
        for link in links:
            link.end()
        for transport in self._transports.values():
            await asyncio.to_thread(transport.close)
        await asyncio.to_thread(self._hasher.shutdown)
        self._hand_back()

    def expire(self) -> None:
        """End the leases whose time is over."""
        with self._lock:
            for lease_id in self._leases.expire(self._clock()):
                self._forget(lease_id, "the lease expired")
        self._hand_back()

    async def _expire_leases(self) -> None:
        while True:
            with self._lock:
                next_expiry = self._leases.next_expiry
            now = self._clock()
            wait = self._config.lease_s if next_expiry is None else next_expiry - now
            await asyncio.sleep(max(0.01, min(wait, self._config.lease_s)))  # no lease made meanwhile ends sooner
            self.expire()

    async def _serve_link(self, stream: MessageStream) -> None:
        link = SourceLink(
            self, self._checksums, self._hasher, os.urandom(LINK_KEY_BYTES), heartbeat_s=self._config.heartbeat_s
        )
        await link.serve(stream, self._config.lease_s)

    # What links ask (LinkDesk).

    def welcome(self, link: SourceLink, hello: pb.Hello) -> pb.HelloReply | None:
        """None: too many links."""
        transport = self._choose(hello)
        if refused := self._refusal(hello):
            return pb.HelloReply(refused=refused)
        if transport is None:
            return pb.HelloReply(refused=f"transport: none of {list(hello.transports)[:8]} can be used")
        with self._lock:
            if len(self._links) >= self._config.max_links:
                log.warning("a sink was turned away: %d links are open", len(self._links))
                return None
            link.checksummed, link.worthwhile_bytes = transport.checksums, transport.worthwhile_bytes
            self._links[link.id] = link
            self._dirty[link] = {}
        return pb.HelloReply(
            epoch=self._epoch,
            layout=layout_to_message(self._memory.layout),
            num_blocks=self._memory.num_blocks,
            lease_ms=round(self._config.lease_s * 1e3),
            transport=transport.name,
            transport_address=transport.address,
            transport_key=transport.key(link.key),
        )

    def open_lease(self, link: SourceLink, lease_id: str, first_block: int) -> None:
        with self._lock:
            held = self._held.get(lease_id)
            if held is None or first_block > len(held.block_ids) or not self._leases.open(lease_id, self._clock()):
                link.post(_closed(lease_id, "no such lease, or it was opened already"))
                return
            held.link = link
            held.num_announced = [first_block] * len(self._groups)
            self._mark(held)

    def renew(self, link: SourceLink, lease_ids: list[str]) -> None:
        with self._lock:
            for lease_id in lease_ids:
                held = self._held.get(lease_id)
                if held is not None and held.link is link:
                    self._leases.renew(lease_id, self._clock())

    def close_lease(self, link: SourceLink, lease_id: str, pulled: bool) -> None:
        """The sink is done. A lease that it never opened it may give up as well."""
        with self._lock:
            held = self._held.get(lease_id)
            valid = False
            if held is not None and (held.link is link or (held.link is None and not pulled)):
                self._dirty[link].pop(lease_id, None)
                held.link = None  # it knows
                valid = self._end(lease_id, "closed")
            if pulled and not link.checksummed:
                link.post(pb.SourceMessage(closed=pb.Closed(lease_id=lease_id, valid=valid)))
        self._hand_back()

    def next_work(self, link: SourceLink) -> Work | None:
        with self._lock:
            dirty = self._dirty.get(link, {})
            while dirty:
                lease_id = next(iter(dirty))
                del dirty[lease_id]  # to the end of the line, if anything is left
                if (work := self._cut(self._held[lease_id])) is not None:
                    dirty[lease_id] = None
                    return work
        return None

    def holds(self, lease_id: str) -> bool:
        with self._lock:
            return lease_id in self._held

    def drop_link(self, link: SourceLink) -> None:
        with self._lock:
            self._links.pop(link.id, None)
            self._dirty.pop(link, None)
            for held in [held for held in self._held.values() if held.link is link]:
                held.link = None
                self._end(held.lease_id, "the link to the sink was lost")
        self._hand_back()

    # What sending transports ask (ReadGuard).

    def link_key(self, link_id: bytes) -> bytes | None:
        with self._lock:
            link = self._links.get(link_id)
            return link.key if link is not None else None

    def begin_read(
        self, link_id: bytes, lease_id: str, pieces: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        with self._lock:
            held = self._held.get(lease_id)
            if held is None or held.link is None or held.link.id != link_id:
                return None
            if any(
                group >= len(self._groups) or block >= min(held.num_final[group], len(held.block_ids))
                for group, block in pieces
            ):
                return None
            if not self._leases.begin_read(lease_id, self._clock()):
                return None
            return [(self._offset(held, group, block), self._piece_bytes(group)) for group, block in pieces]

    def end_read(self, lease_id: str) -> None:
        with self._lock:
            self._leases.end_read(lease_id)
        self._hand_back()

    # Under the lock.

    def _mark(self, held: _Held) -> None:
        if held.link is not None:
            self._dirty[held.link][held.lease_id] = None
            held.link.signal()

    def _end(self, lease_id: str, reason: str) -> bool:
        valid = self._leases.end(lease_id, self._clock())
        self._forget(lease_id, reason)
        return valid

    def _forget(self, lease_id: str, reason: str) -> None:
        held = self._held.pop(lease_id, None)
        if held is not None and held.link is not None:
            self._dirty[held.link].pop(lease_id, None)
            held.link.post(_closed(lease_id, reason))

    def _cut(self, held: _Held) -> Work | None:
        """What of the lease to announce next: all that is final, or as much of one group as is hashed at once."""
        groups = [group for group, final in enumerate(held.num_final) if held.num_announced[group] < final]
        if not groups and held.first_token is None:
            return None
        assert held.link is not None, held.lease_id
        if self._should_wait(held, held.link.worthwhile_bytes):
            return None
        if held.link.checksummed:
            spans = [self._take(held, group, self._config.announce_bytes) for group in groups[:1]]
        else:
            spans = [self._take(held, group, self._memory.size) for group in groups]
        first_token = None
        if held.all_announced:
            first_token, held.first_token = held.first_token, None
        return Work(held.lease_id, tuple(spans), first_token)

    def _should_wait(self, held: _Held, worthwhile_bytes: int) -> bool:
        """More is to come soon, and what is pending would not be worth a copy. Only the last group is spared that
        company: whatever it is copied with is not hidden by computing."""
        if held.first_token is not None or self._num_pending_bytes(held) >= worthwhile_bytes:
            return False
        missing = [group for group, final in enumerate(held.num_final) if final < len(held.block_ids)]
        return missing not in ([], [len(self._groups) - 1])

    def _num_pending_bytes(self, held: _Held) -> int:
        """Of what is final and not announced."""
        pairs = enumerate(zip(held.num_final, held.num_announced, strict=True))
        return sum((final - announced) * self._piece_bytes(group) for group, (final, announced) in pairs)

    def _take(self, held: _Held, group: int, max_bytes: int) -> Span:
        """At least a piece."""
        start = held.num_announced[group]
        max_blocks = max(1, max_bytes // self._piece_bytes(group))
        held.num_announced[group] = min(held.num_final[group], start + max_blocks)
        block_ids = held.block_ids[start : held.num_announced[group]]
        first = self._groups[group].start * self._memory.layout.layer_bytes
        return Span(group, start, tuple(block_ids), first, self._piece_bytes(group))

    def _offset(self, held: _Held, group: int, block: int) -> int:
        layout = self._memory.layout
        return held.block_ids[block] * layout.block_bytes + self._groups[group].start * layout.layer_bytes

    def _piece_bytes(self, group: int) -> int:
        return len(self._groups[group]) * self._memory.layout.layer_bytes

    def _hand_back(self) -> None:
        """Not under the lock: the callee may take locks of its own."""
        with self._lock:
            released = self._leases.take_released()
        for lease_id, block_ids in released:
            self._on_released(lease_id, block_ids)

    def _choose(self, hello: pb.Hello) -> ServerTransport | None:
        for name in hello.transports:
            transport = self._transports.get(name)
            if transport is not None and transport.reaches(hello.boot_id):
                return transport
        return None

    def _refusal(self, hello: pb.Hello) -> str:
        refused = difference(self._fingerprint, hello.fingerprint)
        if refused:
            return refused
        try:
            plan_transfer([self._memory.layout], layout_from_message(hello.layout))
        except ValueError as error:
            return str(error)
        return ""


def _checksums_of(memory: KvMemory) -> PieceChecksums:
    if isinstance(memory, HostMemory):
        return HostChecksums(memory)
    from engine.kv.device_memory import DeviceMemory
    from kv_transfer.staging import DeviceChecksums  # loads torch

    assert isinstance(memory, DeviceMemory), memory
    return DeviceChecksums(memory)


def _closed(lease_id: str, reason: str) -> pb.SourceMessage:
    return pb.SourceMessage(closed=pb.Closed(lease_id=lease_id, valid=False, reason=reason))
