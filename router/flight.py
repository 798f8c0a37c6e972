"""The life of one request in the router: waiting, tried on workers, tried again, over.

This is the only place of the system that retries. A new attempt starts from the prompt and every token already
received, with the same seed, so the client sees one undisturbed stream. Attempts are bounded by the request's deadline,
and in number while they add nothing. Once over, a flight holds no timer, no attempt and no place in the queue.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from engine.errors import InvalidRequest
from engine.kv.block_hash import packed_hashes
from engine.request import FinishReason, Request
from engine.wire import submit_to_pb
from protos import worker_pb2 as pb
from router.attempt import Attempt
from router.block_table import Hashes
from router.generation import DeadlineExceeded, GenerationFailed, RouteHints
from router.placement import Placed
from router.policies import RequestFacts
from router.session import WorkerSession
from router.stream import TokenStream

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryConfig:
    max_fruitless: int = 8  # attempts in a row that add no token: such a request may be what breaks the workers
    backoff_s: float = 0.05  # before the third fruitless attempt, doubling; the second starts at once


@dataclass(frozen=True, slots=True)
class Slo:
    """What each request should take, from its arrival; one that no worker can serve so is refused."""

    ttft_s: float | None = None  # until the first token; None: any time
    tpot_s: float | None = None  # for each later one


_NO_LIMITS = Slo()
_NOBODY: frozenset[str] = frozenset()


class FlightOwner(Protocol):
    def flight_waits(self, flight: "Flight") -> None:
        """An attempt failed; the flight wants another."""
        ...

    def flight_over(self, flight: "Flight") -> None: ...


class Flight:
    """Times are by `clock`, the dispatcher's monotonic seconds. Raises InvalidRequest for what no message can carry."""

    def __init__(
        self,
        request: Request,
        deadline: float,
        owner: FlightOwner,
        config: RetryConfig,
        *,
        hints: RouteHints,
        slo: Slo,
        chain_seed: int,
        clock: Callable[[], float],
    ) -> None:
        assert len(request.token_ids) == request.num_prompt_tokens, request.num_prompt_tokens
        self._submit = _submit_message(request)
        self.waiting_since = clock()
        self.stream = TokenStream(request.params.max_tokens, self.waiting_since, clock)
        self._request = request
        self._deadline = deadline
        self._owner = owner
        self._config = config
        self._hints = hints
        self._slo = slo if hints.ttft_s is None and hints.tpot_s is None else _strictest(hints, slo)
        self._chain_seed = chain_seed
        self._clock = clock
        self._hashes: dict[int, Hashes] = {}  # by block size, of the tokens the next attempt submits
        self._excluded = _NOBODY
        self._num_fruitless = 0
        self._attempt: Attempt | None = None
        self._retry_timer: asyncio.TimerHandle | None = None
        self._over = False
        self._loop = asyncio.get_running_loop()
        self._deadline_timer = self._loop.call_later(max(0.0, deadline - self.waiting_since), self._expire)
        self.stream.on_close(self.close)

    @property
    def has_tokens(self) -> bool:
        return bool(self.stream.token_ids)

    @property
    def reusable(self) -> bool:
        """Whether cached blocks spare any work: logprobs of the prompt need all of it computed."""
        return self._request.params.prompt_logprobs is None or self.has_tokens

    def facts(self) -> RequestFacts:
        request = self._request
        slo = _NO_LIMITS if self.stream.decisions else self._slo  # one that has begun is not refused
        return RequestFacts(
            num_tokens=len(request.token_ids),
            max_new_tokens=self.stream.num_left,
            arrived=self.stream.timeline.received,
            priority=request.priority,
            tenant=self._hints.tenant,
            session=self._hints.session,
            ttft_s=slo.ttft_s,
            tpot_s=slo.tpot_s,
            excluded=self._excluded,
        )

    def hashes(self, block_size: int) -> Hashes:
        hashes = self._hashes.get(block_size)
        if hashes is None:
            packed = packed_hashes(self._submit.token_ids, block_size, self._chain_seed)
            hashes = self._hashes[block_size] = np.frombuffer(packed, ">u8").astype(np.uint64)
        return hashes

    def launch(self, placed: Placed["Flight"], prefill: WorkerSession | None, decode: WorkerSession) -> None:
        """Start an attempt on the workers it was placed on, which are attached."""
        decision, timeline = placed.decision, self.stream.timeline
        timeline.attempts += 1
        if timeline.dispatched is None:
            timeline.dispatched = self._clock()
        timeline.prefill_worker, timeline.decode_worker = decision.prefill or "", decision.decode
        self.stream.decisions.append(decision)
        log.debug("request %s, attempt %d: %s", self._request.id, timeline.attempts, decision)
        self._attempt = Attempt(
            self._submit, self.stream, self, prefill=prefill, decode=decode, timeout_ms=self._timeout_ms
        )
        self._attempt.start(placed.on_prefill, placed.on_decode)

    def attempt_finished(self) -> None:
        self._finish()

    def attempt_refused(self, error: InvalidRequest) -> None:
        if self.has_tokens and error.code == "context_length_exceeded":  # a worker with less room than the first one
            self.stream.finish(FinishReason.LENGTH)
            self._finish()
        else:
            self.give_up(error)

    def attempt_failed(self, suspects: frozenset[str], reason: str) -> None:
        log.info("request %s, attempt %d failed: %s", self._request.id, self.stream.timeline.attempts, reason)
        self._attempt = None
        progressed = len(self.stream.token_ids) > len(self._request.token_ids) - self._request.num_prompt_tokens
        self._num_fruitless = 0 if progressed else self._num_fruitless + 1
        if self.stream.num_left <= 0:
            self.stream.finish(FinishReason.LENGTH)
            self._finish()
        elif self._num_fruitless >= self._config.max_fruitless:
            self.give_up(GenerationFailed(f"{self._num_fruitless} attempts in a row failed"))
        else:
            self._excluded = suspects
            self._resume_from_received()
            delay = self._config.backoff_s * 2 ** (self._num_fruitless - 2) if self._num_fruitless > 1 else 0.0
            if delay:
                self._retry_timer = self._loop.call_later(delay, self._wait)
            else:
                self._wait()

    def give_up(self, error: Exception) -> None:
        self.stream.fail(error)
        self._finish()

    def close(self) -> None:
        """The client left, or got everything. Idempotent."""
        self._finish()

    def _wait(self) -> None:
        self._retry_timer = None
        self.waiting_since = self._clock()
        self._owner.flight_waits(self)

    def _resume_from_received(self) -> None:
        request, received = self._request, self.stream.token_ids
        params = request.params
        if received and params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)  # the client has them
        prompt = request.token_ids[: request.num_prompt_tokens]
        self._request = msgspec.structs.replace(request, token_ids=prompt + tuple(received), params=params)
        self._submit = _submit_message(self._request)
        self._hashes = {}

    def _expire(self) -> None:
        self.give_up(DeadlineExceeded("the request's deadline passed"))

    def _timeout_ms(self) -> int:
        return max(1, int((self._deadline - self._clock()) * 1000))

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        self.stream.on_close(None)  # they are no cycle that somebody has to collect
        self._deadline_timer.cancel()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        if self._attempt is not None:
            self._attempt.abort()
            self._attempt = None
        self._owner.flight_over(self)


def _strictest(hints: RouteHints, slo: Slo) -> Slo:
    return Slo(_least(hints.ttft_s, slo.ttft_s), _least(hints.tpot_s, slo.tpot_s))


def _least(*seconds: float | None) -> float | None:
    return min((each for each in seconds if each is not None), default=None)


def _submit_message(request: Request) -> pb.Submit:
    """Made once for all workers of an attempt, and before the request waits: a bad number must not surface later,
    where it would break a session that serves others."""
    try:
        return submit_to_pb(request, handle=0, timeout_ms=0)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest("a number in the request is outside the range of its field") from error
