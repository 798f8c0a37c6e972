"""The client's end of one request: tokens from whichever worker sends them, each index exactly once and in order.

The current attempt writes (`accept`, `fail`), the HTTP front takes deltas where they arrive (`forward`) or iterates.
Everything that arrived between two takes comes out as one delta, so a slow client costs memory bounded by max_tokens
and no work per token. A consumer may also ask for several tokens at once.
While the next tokens can only be lone ones they may go by a lane (`router.lanes`), which is closed before anything
else happens here. Invariant: `token_ids[i]` is output token i, and what was accepted never changes.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason
from router.generation import Delta, LoneTokens, Timeline
from router.lanes import LaneEvents, Lanes
from router.policies import RoutingDecision

_NOTHING: list[Any] = []  # shared, so never added to: a token of a stream touches as little memory as it can
_Piece = tuple[list[int], list[TokenLogprobs], FinishReason | None]


class TokenStream:
    """Implements router.generation.GenerationStream. One consumer, on the dispatcher's loop."""

    __slots__ = (
        "_armed",
        "_clock",
        "_consumer",
        "_early",
        "_ended",
        "_error",
        "_finish_reason",
        "_handle",
        "_in_lane",
        "_interval",
        "_lanes",
        "_logprobs",
        "_lone",
        "_max_tokens",
        "_num_taken",
        "_on_close",
        "_token_ids",
        "_waiter",
        "decisions",
        "prompt_logprobs",
        "timeline",
    )

    def __init__(self, max_tokens: int, received: float, clock: Callable[[], float]) -> None:
        self.timeline = Timeline(received=received)
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self._token_ids: list[int] = []
        self.decisions: list[RoutingDecision] = []
        self._max_tokens = max_tokens
        self._clock = clock
        self._num_taken = 0  # tokens that the consumer has
        self._logprobs: list[TokenLogprobs] = _NOTHING  # of the others
        self._early: dict[int, _Piece] | None = None  # the decode worker's first may overtake the prefill worker's
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._ended = False  # nothing follows what is buffered
        self._waiter: asyncio.Future[bool] | None = None
        self._consumer: Callable[[Delta], bool] | None = None  # while there is a waiter
        self._interval = 1  # likewise, else 1: tokens that the consumer takes at once
        self._lone: LoneTokens | None = None  # likewise, and where the consumer has one
        self._armed: LoneTokens | None = None  # that, while the next token goes there: `_num_taken` lags behind then
        self._on_close: Callable[[], None] | None = None
        self._lanes: Lanes | None = None  # while one worker alone sends tokens, for `_handle`
        self._handle = 0
        self._in_lane = False  # `_token_ids` lacks what went there

    @property
    def token_ids(self) -> list[int]:
        self.close_lane()
        return self._token_ids

    def on_close(self, callback: Callable[[], None] | None) -> None:
        """`callback` runs when the consumer leaves; None: nothing does."""
        self._on_close = callback

    @property
    def num_left(self) -> int:
        return self._max_tokens - len(self.token_ids)

    def lane_at(self, lanes: Lanes | None, handle: int = 0) -> None:
        """Where from now on all tokens come from, one worker; None: from several, or none."""
        self.close_lane()
        self._lanes, self._handle = lanes, handle

    def open_lane(self, events: LaneEvents, descriptor: int) -> None:
        """See GenerationStream.open_lane."""
        lanes = self._lanes
        if lanes is not None and cast(object, self._armed) is events and not self._in_lane:
            self._in_lane = lanes.open(self._handle, self, len(self._token_ids), descriptor, events)

    def close_lane(self) -> None:
        if self._in_lane:
            assert self._lanes is not None
            self._lanes.close(self._handle)

    def lane_closed(self, token_ids: list[int]) -> None:
        """Called by the lanes."""
        self._in_lane = False
        self._token_ids += token_ids

    def accept(
        self, index: int, token_ids: list[int], logprobs: list[TokenLogprobs], finish_reason: FinishReason | None
    ) -> bool:
        """Take output tokens `index ..`; known ones are dropped, early ones kept back. True once finished.

        The lists are the stream's from then on.
        """
        self._disarm()
        num_known = len(self._token_ids)
        if index > num_known:
            early = self._early = self._early or {}
            if len(early.get(index, ([],))[0]) <= len(token_ids):
                early[index] = (token_ids, logprobs, finish_reason)
            return False
        if index < num_known:
            token_ids, logprobs = token_ids[num_known - index :], logprobs[num_known - index :]
        self._append(token_ids, logprobs, finish_reason)
        if self._early is not None:
            self._append_early(self._early)
        if self._waiter is not None:
            self._wake()
        return self._ended

    def accept_token(self, index: int, token_id: int) -> bool:
        """`accept` of one token and nothing else, the short way for nearly all tokens of a stream."""
        if self._in_lane:
            self.close_lane()
        lone, token_ids = self._armed, self._token_ids
        if lone is None:
            waits = index + 1 - self._num_taken < self._interval and index == len(token_ids)
            if waits and self._num_taken and self._early is None and not self._ended:
                token_ids.append(token_id)
                return False
        elif index == len(token_ids):
            token_ids.append(token_id)
            try:
                if lone.take(token_id):
                    return False
            except Exception as error:  # the consumer's, not of the worker whose frame this is
                self._answer_waiter(error)
            else:
                self._answer_waiter(False)
            return False
        return self.accept(index, [token_id], [], None)

    def _append_early(self, early: dict[int, _Piece]) -> None:
        while early and (first := min(early)) <= len(self._token_ids):
            token_ids, logprobs, finish_reason = early.pop(first)
            known = len(self._token_ids) - first
            self._append(token_ids[known:], logprobs[known:], finish_reason)
        self._early = early or None

    def discard_early(self) -> None:
        """The attempt is over; the next one starts from what was accepted in order."""
        self.lane_at(None)
        self._early = None

    def finish(self, reason: FinishReason) -> None:
        self._disarm()
        self._finish_reason, self._ended = reason, True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Raised to the consumer after the tokens it has not taken yet. No effect on a finished stream."""
        if not self._ended:
            self._disarm()
            self._error, self._ended = error, True
            self._wake()

    async def forward(
        self,
        take: Callable[[Delta], bool],
        lone: LoneTokens | None = None,
        *,
        interval: int = 1,
    ) -> bool:
        """See GenerationStream.forward."""
        more = True
        while more:
            delta = self._take()
            if delta is not None:
                more = take(delta)
            elif self._error is not None:
                raise self._error
            elif self._ended:
                return False
            else:
                more = await self._wait(take, lone, interval)
        return True

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> Delta:
        taken: list[Delta] = []

        def take(delta: Delta) -> bool:
            taken.append(delta)
            return False

        await self.forward(take)
        if not taken:
            raise StopAsyncIteration
        return taken[0]

    async def aclose(self) -> None:
        if self._on_close is not None:
            self._on_close()
        if self.token_ids and self.timeline.last_token is None:
            self.timeline.last_token = self._clock()
        self._disarm()
        self._num_taken, self._logprobs = len(self.token_ids), _NOTHING
        self._finish_reason, self._error, self._ended = None, None, True
        self._wake()

    def _append(self, token_ids: list[int], logprobs: list[TokenLogprobs], reason: FinishReason | None) -> None:
        if self._ended:
            return
        if token_ids:
            if not self._token_ids:
                self.timeline.first_token = self._clock()
            self._token_ids += token_ids
            if self._logprobs:
                self._logprobs += logprobs
            elif logprobs:
                self._logprobs = logprobs
        if reason is not None:
            self.timeline.last_token = self._clock()
            self._finish_reason, self._ended = reason, True

    def _take(self) -> Delta | None:
        reason, num_known = self._finish_reason, len(self._token_ids)
        if self._num_taken == num_known and reason is None:
            return None
        delta = Delta(self._token_ids[self._num_taken :], self._logprobs, reason)
        self._num_taken, self._logprobs = num_known, _NOTHING
        self._finish_reason = None
        return delta

    async def _wait(self, take: Callable[[Delta], bool], lone: LoneTokens | None, interval: int) -> bool:
        """Until the consumer, called from where tokens arrive, wants no more (then False), or the stream ended."""
        self._consumer, self._interval = take, interval
        self._lone = lone if interval == 1 else None
        self._waiter = asyncio.get_running_loop().create_future()
        self._arm()
        try:
            return await self._waiter
        finally:
            self._disarm()
            self._consumer = self._lone = self._waiter = None
            self._interval = 1

    def _arm(self) -> None:
        """The consumer has everything and waits: the next token, if it is a lone one, goes to it directly."""
        if self._num_taken and self._early is None:
            self._armed = self._lone

    def _disarm(self) -> None:
        if self._armed is not None:
            self.close_lane()
            self._armed, self._num_taken = None, len(self._token_ids)

    def _answer_waiter(self, answer: bool | Exception) -> None:
        """What it waits for; it has all tokens, and is not waiting any more. Unless it has been cancelled meanwhile."""
        waiter = self._waiter
        self._disarm()
        if waiter is None or waiter.done():
            return
        if isinstance(answer, Exception):
            waiter.set_exception(answer)
        else:
            waiter.set_result(answer)

    def _wake(self) -> None:
        waiter, consumer, more = self._waiter, self._consumer, True
        if waiter is None or waiter.done():
            return
        if self._num_taken and len(self._token_ids) - self._num_taken < self._interval and not self._ended:
            return
        delta = self._take()
        if delta is not None and consumer is not None:
            try:
                more = consumer(delta)
            except Exception as error:  # the consumer's, not of the worker whose frame this is
                self._answer_waiter(error)
                return
        if self._ended or not more:
            self._answer_waiter(more)
        elif not waiter.done():
            self._arm()
