"""One try of one request on one pair of workers, from the routing decision to its last token.

    reserve decode, submit to prefill -> offer -> submit to decode -> first token -> handoff done -> tokens -> finished

Without a prefill worker it begins with the submit to decode. Driven by what the two sessions deliver, on the loop;
it holds no task and no timer. It ends once, by exactly one call to its owner or by `abort`, and by then every worker
has finished, failed or been told to cancel: an attempt that is over hears nothing and leaves nothing behind.
"""

from collections.abc import Callable
from typing import Protocol

from engine.errors import InvalidRequest
from engine.wire import finish_from_pb, logprobs_from_pb
from protos import worker_pb2 as pb
from router.cluster_view import Reservation
from router.session import Sink, TakeToken, WorkerSession
from router.stream import TokenStream

_OF_PREFILL = frozenset(("queued_us", "prefill_us", "cached_tokens"))  # fields of Timing

# Of each of its fields, by number: the name in Timeline, the unit there, and whether it is of who prefills.
_TIMINGS = {
    field.number: (
        f"{field.name[:-3]}_s" if field.name.endswith("_us") else field.name,
        1e6 if field.name.endswith("_us") else None,
        field.name in _OF_PREFILL,
    )
    for field in pb.Timing.DESCRIPTOR.fields
}


class AttemptOwner(Protocol):
    def attempt_finished(self) -> None:
        """The stream holds the last token."""
        ...

    def attempt_failed(self, suspects: frozenset[str], reason: str) -> None:
        """Another attempt may succeed, better without the workers `suspects`."""
        ...

    def attempt_refused(self, error: InvalidRequest) -> None: ...


class _Leg:
    """The attempt's part on one worker."""

    __slots__ = ("handle", "session", "worker_id")

    def __init__(self, session: WorkerSession) -> None:
        self.session = session
        self.worker_id = session.member.worker_id
        self.handle = 0

    def open(self, sink: Sink, part: Reservation) -> None:
        self.handle = self.session.open(sink, part)

    def tokens_to(self, take: TakeToken) -> None:
        self.session.tokens_to(self.handle, take)

    def close(self, *, cancel: bool) -> None:
        self.session.close(self.handle, cancel=cancel)


class _PrefillSink:
    """What the prefill worker of an attempt says."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: "Attempt") -> None:
        self._attempt = attempt

    def token(self, index: int, token_id: int) -> None:
        self._attempt.prefill_output(pb.Output(index=index, token_ids=(token_id,)))

    def output(self, output: pb.Output) -> None:
        self._attempt.prefill_output(output)

    def lost(self) -> None:
        self._attempt.prefill_lost()


class Attempt:
    """`submit` is what every worker gets, but for handle, timeout and offer; its token_ids are the prompt and every
    token of `stream`. `timeout_ms` is asked when a worker gets it.

    It is itself the sink of its decode worker, but once that one is alone lone tokens go straight to the stream.
    """

    __slots__ = (
        "_decode",
        "_first_index",
        "_handoff_done",
        "_needs_decode",
        "_over",
        "_owner",
        "_prefill",
        "_stream",
        "_template",
        "_timeout_ms",
        "_wants_logprobs",
        "_wants_prompt_logprobs",
    )

    def __init__(
        self,
        submit: pb.Submit,
        stream: TokenStream,
        owner: AttemptOwner,
        *,
        prefill: WorkerSession | None,
        decode: WorkerSession,
        timeout_ms: Callable[[], int],
    ) -> None:
        self._template = submit
        self._stream = stream
        self._owner = owner
        self._timeout_ms = timeout_ms
        self._prefill = _Leg(prefill) if prefill is not None else None
        self._decode = _Leg(decode)
        self._first_index = len(stream.token_ids)
        self._needs_decode = stream.num_left > 1  # the prefill worker samples one token
        self._wants_logprobs = submit.params.HasField("logprobs")
        self._wants_prompt_logprobs = submit.params.HasField("prompt_logprobs")
        self._handoff_done = False
        self._over = False

    def start(self, on_prefill: Reservation, on_decode: Reservation) -> None:
        """Both sessions are attached. `on_prefill` is only for a prefill worker."""
        self._decode.open(self, on_decode)
        if self._prefill is None:
            self._decode_alone()
            self._submit(self._decode, b"")
        else:
            self._prefill.open(_PrefillSink(self), on_prefill)
            self._submit(self._prefill, b"")

    def abort(self) -> None:
        """Cancel on every worker. Idempotent."""
        self._over = True
        self._stream.discard_early()
        self._decode.close(cancel=True)
        if self._prefill is not None:
            self._prefill.close(cancel=True)

    def _submit(self, leg: _Leg, offer: bytes) -> None:
        leg.session.submit(leg.handle, self._template, self._timeout_ms(), offer)

    def prefill_output(self, output: pb.Output) -> None:
        assert self._prefill is not None
        if output.HasField("error"):
            self._failed(self._prefill, output.error)
            return
        if output.HasField("timing"):
            self._note_timing(output.timing, prefilled=True)
        if self._tokens(self._prefill, output):
            return
        if output.offer and self._needs_decode:
            self._submit(self._decode, output.offer)
        self._release_prefill()

    def token(self, index: int, token_id: int) -> None:
        if self._stream.accept_token(index, token_id):
            self._finish()
        else:
            self._release_prefill()

    def output(self, output: pb.Output) -> None:
        if output.HasField("error"):
            self._failed(self._decode, output.error)
            return
        if output.HasField("timing"):
            self._note_timing(output.timing, prefilled=self._prefill is None)
        if output.handoff_done:
            self._handoff_done = True
        if not self._tokens(self._decode, output):
            self._release_prefill()

    def _tokens(self, leg: _Leg, output: pb.Output) -> bool:
        """Pass tokens on; True when they ended the attempt."""
        if self._wants_prompt_logprobs and output.prompt_logprobs:
            self._stream.prompt_logprobs = [logprobs_from_pb(each) for each in output.prompt_logprobs]
        reason = finish_from_pb(output.finish_reason) if output.finish_reason else None
        token_ids = list(output.token_ids)
        if not token_ids and reason is None:
            return False
        logprobs = [logprobs_from_pb(each) for each in output.logprobs] if self._wants_logprobs else []
        if not self._stream.accept(output.index, token_ids, logprobs, reason):
            return False
        if reason is not None:
            leg.close(cancel=False)  # it has finished there
        self._finish()
        return True

    def _finish(self) -> None:
        self.abort()
        self._owner.attempt_finished()

    def _release_prefill(self) -> None:
        """Once the first token is here and decode has the KV: the prefill worker may go."""
        arrived = len(self._stream.token_ids) > self._first_index
        if self._prefill is not None and self._handoff_done and arrived:
            self._prefill.close(cancel=False)
            self._prefill = None
            self._decode_alone()

    def _decode_alone(self) -> None:
        self._decode.tokens_to(self._stream.accept_token)
        self._stream.lane_at(self._decode.session.lanes, self._decode.handle)

    def _failed(self, leg: _Leg, error: pb.Error) -> None:
        leg.close(cancel=False)  # it has ended there
        if error.retryable:
            self._end(self._suspects(leg), f"{leg.worker_id}: {error.message}")
        elif not self._over:
            self.abort()
            self._owner.attempt_refused(_refusal(error))

    def _suspects(self, leg: _Leg) -> frozenset[str]:
        """Before the handoff is done, a failure on the decode side may be the prefill side's fault."""
        if leg is self._decode and self._prefill is not None and not self._handoff_done:
            return frozenset((leg.worker_id, self._prefill.worker_id))
        return frozenset((leg.worker_id,))

    def prefill_lost(self) -> None:
        if self._prefill is not None:
            self._end(frozenset((self._prefill.worker_id,)), f"{self._prefill.worker_id}: lost")

    def lost(self) -> None:
        self._end(frozenset((self._decode.worker_id,)), f"{self._decode.worker_id}: lost")

    def _end(self, suspects: frozenset[str], reason: str) -> None:
        if not self._over:
            self.abort()
            self._owner.attempt_failed(suspects, reason)

    def _note_timing(self, timing: pb.Timing, *, prefilled: bool) -> None:
        """`prefilled`: by this worker. Of a retried request, the prompt's cache hit stays the first attempt's."""
        timeline = self._stream.timeline
        for field, value in timing.ListFields():
            name, unit, of_prefill = _TIMINGS[field.number]
            if (of_prefill and not prefilled) or (name == "cached_tokens" and self._first_index):
                continue
            setattr(timeline, name, value / unit if unit else value)


def _refusal(error: pb.Error) -> InvalidRequest:
    return InvalidRequest(error.message, param=error.param or None, code=error.code or "invalid_value")
