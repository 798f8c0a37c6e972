"""KV on its way from a simulated prefill worker to a decode worker, under a lease of the real LeaseTable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.simulation.sequence import SimulatedRequest
from cluster.simulation.transfer import Link, TransferSpeed, transfer_end

if TYPE_CHECKING:
    from cluster.simulation.prefill import SimulatedPrefill


@dataclass(slots=True)
class Handoff:
    """What an offer names. Announced as the prompt is computed, pulled from when the sink has reserved blocks."""

    source: "SimulatedPrefill"
    lease_id: str
    request: SimulatedRequest
    num_final_tokens: int  # of the prompt, whose KV will not change any more
    pull: "SimulatedPull | None" = None

    @property
    def complete(self) -> bool:
        return self.num_final_tokens == len(self.request.token_ids)

    def announce(self, num_final_tokens: int, began: float, now: float) -> None:
        """A step from `began` to `now` has computed up to here."""
        self.num_final_tokens = num_final_tokens
        if self.pull is not None:
            self.pull.proceed(began, now)


class SimulatedPull:
    """Copies what is announced. `ended(True)` is called once, at the time everything is in place; `ended(False)`, at
    once, when the lease ends before. Implements decode_workers.intake.RunningPull."""

    def __init__(
        self,
        handoff: Handoff,
        sink: Link,
        num_held_tokens: int,
        speed: TransferSpeed,
        kv_bytes_per_token: int,
        ended: "Callable[[SimulatedPull, float | None], None]",
    ) -> None:
        self.handoff = handoff
        self.num_bytes = 0
        self.num_tokens = 0
        self.exposed_s = 0.0  # from the last announcement to the last byte
        self._sink = sink
        self._speed = speed
        self._kv_bytes_per_token = kv_bytes_per_token
        self._num_copied_tokens = num_held_tokens
        self._done_at = 0.0
        self._ended = ended

    def proceed(self, began: float, now: float) -> None:
        handoff = self.handoff
        num_tokens = handoff.num_final_tokens - self._num_copied_tokens
        if num_tokens > 0:
            num_bytes = num_tokens * self._kv_bytes_per_token
            end = transfer_end(num_bytes, began, now, handoff.source.link, self._sink, self._speed)
            self._done_at = max(self._done_at, end)
            self._num_copied_tokens = handoff.num_final_tokens
            self.num_bytes += num_bytes
            self.num_tokens += num_tokens
        if handoff.complete:
            self._done_at = max(self._done_at, now)
            self.exposed_s = self._done_at - now
            self._ended(self, self._done_at)

    def fail(self) -> None:
        self._ended(self, None)

    def cancel(self) -> bool:
        """As a Future that cannot be: nobody gives a request up once its pull runs."""
        return False
