"""One pull: what a source has announced of one lease, and the copies that bring it here.

Lives on the asyncio loop. Its SinkLink feeds it (`announced`, `closed`, `lost`), `run` copies until everything is in
place and proven: by its checksums, or where it has none by the source, which confirms that the lease held. Every
message is checked against the offer and the negotiated layout before anything is copied. Invariant: when `run` returns
or raises, no copy into the sink's blocks is running or will ever start, even if the task was cancelled.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import Event

from engine.errors import TransferError
from kv_transfer.busy_time import BusyTime
from kv_transfer.copier import Copier
from kv_transfer.handoff import Handoff, HandoffState
from kv_transfer.transports.base import Run
from protos import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Pulled:
    """`num_blocks` of the sink were filled. `copy_seconds`: time in which at least one copy ran.
    `exposed_seconds`: from hearing that prefill is complete to the last byte in place. `link_seconds`: in which any
    pull of the sink copied, since the last one ended."""

    first_token: int
    finished: bool  # nothing is left to decode
    num_blocks: int
    num_bytes: int
    copy_seconds: float
    exposed_seconds: float
    link_seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class PullLimits:
    num_jobs: int  # at once
    max_failures: int  # of one piece, before the pull fails


class Pull:
    def __init__(
        self,
        *,
        lease_id: str,
        first_block: int,
        num_blocks: int,
        copier: Copier,
        handoff: Handoff,
        limits: PullLimits,
        send: Callable[[pb.SinkMessage], None],
        pool: Executor,
        busy: BusyTime,
        clock: Callable[[], float],
    ) -> None:
        self.lease_id = lease_id
        self._num_blocks = num_blocks
        self._copier = copier
        self._handoff = handoff
        self._limits = limits
        self._send = send
        self._pool = pool
        self._busy = busy
        self._clock = clock
        num_groups = len(copier.groups)
        self._next_block = [first_block] * num_groups  # of the source, for each layer group
        self._first_block = first_block
        self._pending: deque[Run] = deque()
        self._jobs: set[asyncio.Future[tuple[list[Run], str]]] = set()
        self._stop = Event()
        self._wake = asyncio.Event()
        self._failure: tuple[HandoffState, str] | None = None
        self._confirmed: bool | None = None
        self._first_token: pb.FirstToken | None = None
        self._token_time = 0.0
        self._busy_since = 0.0
        self._copy_seconds = 0.0
        self._num_bytes = 0

    # What the link hears. On the loop.

    def announced(self, message: pb.Announcement) -> None:
        wrong = "after the end" if self._first_token is not None else ""
        for pieces in message.pieces:
            wrong = wrong or self._note(pieces)
        if message.HasField("first_token") and not wrong:
            if min(self._next_block) != self._num_blocks:
                wrong = "its end too early"
            self._first_token = message.first_token
            self._token_time = self._clock()
        if wrong:
            self._fail(HandoffState.FAILED, f"the source announced {wrong}")
        self._wake.set()

    def _note(self, pieces: pb.Pieces) -> str:
        """Remember to copy them. Returns what is wrong with them."""
        group, count = pieces.layer_group, pieces.num_blocks
        if group >= len(self._next_block):
            return "a layer group that there is not"
        start = self._next_block[group]
        if pieces.first_block != start or start + count > self._num_blocks:
            return "blocks out of order"
        if len(pieces.checksums) != (count if self._copier.checksums else 0):
            return "another number of checksums than of pieces"
        self._next_block[group] = start + count
        if count and group in self._copier.needed_groups:
            self._pending.append(Run(group, start, count, tuple(pieces.checksums)))
        return ""

    def closed(self, message: pb.Closed) -> None:
        if self._handoff.state is HandoffState.READY and not message.reason:
            self._confirmed = message.valid
            self._wake.set()
        else:
            self._fail(HandoffState.ABORTED, f"the source ended the lease: {message.reason[:200]}")

    def lost(self, reason: str) -> None:
        self._fail(HandoffState.FAILED, reason)

    # The task.

    async def run(self) -> tuple[pb.FirstToken, int, float, float]:
        """Returns (first token, bytes copied, seconds copying, seconds exposed). Raise TransferError."""
        try:
            self._open()
            await self._copy_all()
            exposed = max(0.0, self._clock() - self._token_time)
            await self._confirm()
        except BaseException:
            self._handoff.end(HandoffState.ABORTED, self._clock())
            self._give_up()
            await self._stop_copies()
            raise
        assert self._first_token is not None
        return self._first_token, self._num_bytes, self._copy_seconds, exposed

    def _open(self) -> None:
        self._handoff.advance(HandoffState.PULLING, self._clock())
        self._send(pb.SinkMessage(open=pb.Open(lease_id=self.lease_id, first_block=self._first_block)))

    async def _copy_all(self) -> None:
        while self._first_token is None or self._pending or self._jobs:
            self._start_jobs()
            await self._wait("prefill and transfer")
            self._collect()

    async def _confirm(self) -> None:
        """What no checksum proves is right if the lease held while it was read: only the source knows."""
        self._handoff.advance(HandoffState.READY, self._clock())
        self._send(pb.SinkMessage(close=pb.Close(lease_id=self.lease_id, pulled=True)))
        while self._confirmed is None and not self._copier.checksums:
            await self._wait("the source's confirmation")
        if self._confirmed is False:
            self._fail(HandoffState.EXPIRED, "the lease ended before everything was read")
            self._check()
        self._handoff.advance(HandoffState.ACKED, self._clock())

    async def _wait(self, what: str) -> None:
        """Until something happened. Raise TransferError when it was a failure, or nothing happened in time."""
        try:
            async with asyncio.timeout(self._handoff.remaining(self._clock())):
                await self._wake.wait()
        except TimeoutError:
            self._fail(HandoffState.EXPIRED, f"deadline passed waiting for {what}")
        self._wake.clear()
        self._check()

    def _fail(self, state: HandoffState, reason: str) -> None:
        if self._failure is None:
            self._failure = (state, reason)
            self._stop.set()
            self._wake.set()

    def _check(self) -> None:
        if self._failure is not None:
            state, reason = self._failure
            self._handoff.end(state, self._clock())
            raise TransferError(reason, retryable=True)

    def _start_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending and len(self._jobs) < self._limits.num_jobs:
            batch = self._take_batch()
            if not self._jobs:
                self._busy_since = self._clock()
                self._busy.begin(self._busy_since)
            job = loop.run_in_executor(self._pool, self._copier.fetch, batch, self._stop)
            job.add_done_callback(lambda _: self._wake.set())
            self._jobs.add(job)
            self._num_bytes += self._size(batch)

    def _take_batch(self) -> list[Run]:
        """About as much of what is pending as one job takes, at least a piece."""
        batch: list[Run] = []
        room = self._copier.job_bytes
        while self._pending and room > 0:
            run = self._pending.popleft()
            size = self._copier.piece_bytes(run.layer_group)
            count = min(run.num_blocks, -(-room // size))
            if count < run.num_blocks:
                self._pending.appendleft(run.part(count, run.num_blocks))
            batch.append(run.part(0, count))
            room -= count * size
        return batch

    def _size(self, runs: Sequence[Run]) -> int:
        return sum(run.num_blocks * self._copier.piece_bytes(run.layer_group) for run in runs)

    def _collect(self) -> None:
        done = {job for job in self._jobs if job.done()}
        self._jobs -= done
        if done and not self._jobs:
            self._rest()
        for job in done:
            bad, reason = job.result()
            self._num_bytes -= self._size(bad)
            for run in bad:
                if run.num_failures >= self._limits.max_failures:
                    self._fail(HandoffState.FAILED, f"block {run.first_block} did not arrive: {reason}")
                self._pending.append(run.part(0, run.num_blocks, num_more_failures=1))
        self._check()

    def _rest(self) -> None:
        """No job runs any more."""
        now = self._clock()
        self._busy.end(now)
        self._copy_seconds += now - self._busy_since

    def _give_up(self) -> None:
        self._stop.set()
        self._send(pb.SinkMessage(close=pb.Close(lease_id=self.lease_id, pulled=False)))

    async def _stop_copies(self) -> None:
        """Wait for running copies, even while being cancelled again: the caller frees the blocks right after."""
        cancelled = False
        while self._jobs and (pending := {job for job in self._jobs if not job.done()}):
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError:
                cancelled = True
        if self._jobs:
            self._rest()
        if cancelled:
            raise asyncio.CancelledError
