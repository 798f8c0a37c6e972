"""The seam between the HTTP front and the dispatcher: one request in, a stream of deltas out.

The front speaks HTTP and text; the dispatcher speaks workers, attempts and retries. Both know only this.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request

if TYPE_CHECKING:  # what it loads takes half a second, and `baton --help` needs none of it
    from router.lanes import LaneEvents


class Overloaded(Exception):
    """The bounded queue is full, or no worker can take the request now. Becomes 429 (or 503 when `unavailable`)."""

    def __init__(self, message: str, *, retry_after: float, unavailable: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.unavailable = unavailable


class DeadlineExceeded(Exception):
    """The request's deadline passed. Becomes 504, or an error event in mid-stream."""


class GenerationFailed(Exception):
    """Every attempt the deadline and the retry budget allowed has failed. Becomes 503, or an error event."""


class Delta(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one request, in order, each exactly once whatever happened to its workers."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]  # aligned with token_ids when asked for, else empty
    finish_reason: FinishReason | None = None  # on the last delta


@dataclass(slots=True)
class Timeline:
    """Where a request's time went. Points are the router's monotonic seconds; durations are the workers' own."""

    received: float
    dispatched: float | None = None  # left the router's queue
    first_token: float | None = None
    last_token: float | None = None
    prefill_worker: str = ""  # of the last attempt; empty when the decode worker prefilled by itself
    decode_worker: str = ""
    attempts: int = 0
    cached_tokens: int = 0  # prompt tokens that needed no prefill
    queued_s: float = 0.0  # in the prefill worker's queue
    prefill_s: float = 0.0
    decode_s: float = 0.0
    transfer_blocks: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    exposed_s: float = 0.0  # transfer time that prefill did not hide
    transport: str = ""


class LoneTokens(Protocol):
    """Who takes tokens that come one at a time."""

    def take(self, token_id: int) -> bool:
        """False: no more."""
        ...


class GenerationStream(Protocol):
    """`aclose` may be called at any time, also instead of `forward`: it cancels the request on every worker.

    `prompt_logprobs` (of prompt tokens 1..) is complete when the first delta arrives.
    """

    timeline: Timeline
    prompt_logprobs: list[TokenLogprobs] | None

    async def forward(
        self,
        take: Callable[[Delta], bool],
        lone: LoneTokens | None = None,
        *,
        interval: int = 1,
    ) -> bool:
        """Call `take` with each delta where it arrives, until it wants no more (False) or the stream has ended.

        `lone`, where given, may get in its place what is a delta by itself: one token, and not the first. After the
        first token, `interval` of them are awaited for a delta. Neither call may block; what is not taken now comes
        together in the next call's first delta. A call that has been cancelled may still get what comes before the
        loop's next turn. Returns whether somebody wanted no more. Raises what they raise, and InvalidRequest,
        DeadlineExceeded, GenerationFailed or Overloaded.
        """
        ...

    def open_lane(self, events: "LaneEvents", descriptor: int) -> None:
        """If `events`, as `lone`, would get the next token: from then on such may be written to `descriptor` directly,
        until something else comes, or `close_lane`. See router.lanes."""
        ...

    def close_lane(self) -> None:
        """Idempotent."""
        ...

    async def aclose(self) -> None: ...


class RouteHints(msgspec.Struct, frozen=True, gc=False):
    """What routing may know of a request that workers need not."""

    session: str = ""  # its turns each begin with the one before; empty: none
    tenant: str = ""  # whose share of the cluster it takes
    ttft_s: float | None = None  # what its first token should take, and each later one, if less than the router says
    tpot_s: float | None = None


NO_HINTS = RouteHints()


class Generator(Protocol):
    """The dispatcher as the front sees it."""

    def start(self, request: Request, deadline: float, hints: RouteHints = NO_HINTS) -> GenerationStream:
        """Admit `request`, to be finished by monotonic time `deadline`. Raises Overloaded at once when full."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request could be served now: at least one decode worker, and a prefill worker or local prefill."""
        ...


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the front must know of the model it serves."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    aliases: tuple[str, ...] = field(default=())
