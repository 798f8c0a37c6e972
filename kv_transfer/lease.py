"""The leases a source has given on its blocks. Pure: the clock is an argument.

Called by KvSource, which serializes the calls. Life of a lease: offered -> opened by a sink -> ended (pulled, given
up, aborted or expired). Invariants: every lease ends exactly once; its blocks are handed back exactly once, through
`take_released`, and never while a sender reads them: until then the ended lease is quarantined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.kv.layout import BlockId


class LeaseState(StrEnum):
    OFFERED = "offered"
    OPENED = "opened"
    QUARANTINED = "quarantined"  # ended, but a read is still running


@dataclass(slots=True)
class _Lease:
    block_ids: list[BlockId]
    expires: float
    last_expires: float  # renewing cannot go beyond
    state: LeaseState = LeaseState.OFFERED
    num_reads: int = 0


class LeaseTable:
    """At most `max_leases` at once, quarantined ones included."""

    def __init__(self, *, lease_s: float, max_lease_s: float, max_leases: int) -> None:
        self._lease_s = lease_s
        self._max_lease_s = max_lease_s
        self._max_leases = max_leases
        self._leases: dict[str, _Lease] = {}
        self._released: list[tuple[str, list[BlockId]]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def state(self, lease_id: str) -> LeaseState | None:
        lease = self._leases.get(lease_id)
        return lease.state if lease is not None else None

    @property
    def next_expiry(self) -> float | None:
        return min((lease.expires for lease in self._leases.values() if self._lives(lease)), default=None)

    def add(self, lease_id: str, block_ids: Sequence[BlockId], now: float) -> bool:
        """False when there are too many. The blocks belong to the lease until `take_released` returns them."""
        assert lease_id not in self._leases, lease_id
        if len(self._leases) >= self._max_leases:
            return False
        self._leases[lease_id] = _Lease(list(block_ids), now + self._lease_s, now + self._max_lease_s)
        return True

    def open(self, lease_id: str, now: float) -> bool:
        """Only one sink opens a lease, once."""
        lease = self._held(lease_id, now)
        if lease is None or lease.state is not LeaseState.OFFERED:
            return False
        lease.state = LeaseState.OPENED
        return self.renew(lease_id, now)

    def renew(self, lease_id: str, now: float) -> bool:
        lease = self._held(lease_id, now)
        if lease is None:
            return False
        lease.expires = min(now + self._lease_s, lease.last_expires)
        return True

    def begin_read(self, lease_id: str, now: float) -> bool:
        """True: the blocks stay until the matching `end_read`, whatever happens to the lease."""
        lease = self._held(lease_id, now)
        if lease is None or lease.state is not LeaseState.OPENED:
            return False
        lease.num_reads += 1
        return True

    def end_read(self, lease_id: str) -> None:
        lease = self._leases[lease_id]
        assert lease.num_reads > 0, lease_id
        lease.num_reads -= 1
        if lease.num_reads == 0 and lease.state is LeaseState.QUARANTINED:
            self._release(lease_id)

    def end(self, lease_id: str, now: float) -> bool:
        """End the lease if it has not ended yet. True when it was held until now: what was read of it is right."""
        lease = self._leases.get(lease_id)
        if lease is None or not self._lives(lease):
            return False
        held = now < lease.expires
        if lease.num_reads:
            lease.state = LeaseState.QUARANTINED
        else:
            self._release(lease_id)
        return held

    def expire(self, now: float) -> list[str]:
        """End every lease whose time is over; returns their ids."""
        due = [id_ for id_, lease in self._leases.items() if self._lives(lease) and lease.expires <= now]
        for lease_id in due:
            self.end(lease_id, now)
        return due

    def take_released(self) -> list[tuple[str, list[BlockId]]]:
        """Ended leases whose blocks nobody reads any more, each exactly once."""
        released, self._released = self._released, []
        return released

    def _release(self, lease_id: str) -> None:
        self._released.append((lease_id, self._leases.pop(lease_id).block_ids))

    def _held(self, lease_id: str, now: float) -> _Lease | None:
        lease = self._leases.get(lease_id)
        return lease if lease is not None and self._lives(lease) and now < lease.expires else None

    @staticmethod
    def _lives(lease: _Lease) -> bool:
        return lease.state is not LeaseState.QUARANTINED
