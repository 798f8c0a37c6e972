"""Runs the choices of one completion request and answers with what they produce, as events or in one body.

Shared by both completion APIs, which differ in their `Format`. Nothing is sent before the first piece, so a failure
until then is an HTTP status; after it, an error event and a connection that ends without `[DONE]`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec

from router.choices import Choice, Pace, Piece, run_choices
from router.detokenizer import Decoder
from router.errors import ClientGone
from router.exchange import Exchange
from router.generation import DeadlineExceeded, GenerationStream, Generator, LoneTokens
from router.lanes import EventTexts
from router.metrics import ABORTED, FAILED, Histogram, Metrics
from router.responses import DONE, Envelope, Format, timeline_body, usage

_encode = msgspec.json.Encoder().encode

GRACE_S = 5.0  # the generator keeps the deadline itself; this bounds it when it does not, and slow clients


class Job(msgspec.Struct, frozen=True, eq=False):
    """What a completion request came to. `num_hidden` generated tokens are neither shown nor counted."""

    choices: Sequence[Choice]
    format: Format
    envelope: Envelope
    stream: bool
    received: float
    deadline: float
    num_hidden: int = 0


class Answerer:
    """`stream_interval`: tokens of a choice that a streamed answer shows at once, after the first."""

    def __init__(
        self, generator: Generator, metrics: Metrics, clock: Callable[[], float], *, stream_interval: int = 1
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._clock = clock
        self._stream_interval = stream_interval
        self._texts = EventTexts()

    async def answer(self, exchange: Exchange, job: Job) -> None:
        """Raises what the generator raises, and ClientGone. Every generation is closed on return."""
        end = FAILED  # of the choices that do not run to theirs
        try:
            with exchange.bounded(max(0.0, job.deadline - self._clock()) + GRACE_S):
                await (self._events(exchange, job) if job.stream else self._body(exchange, job))
        except TimeoutError:
            raise DeadlineExceeded from None
        except ClientGone:
            end = ABORTED
            raise
        finally:
            unfinished = [choice for choice in job.choices if choice.stream is not None and not choice.finish_reason]
            self._metrics.finished[end] += len(unfinished)

    async def _events(self, exchange: Exchange, job: Job) -> None:
        with _Events(self._metrics, self._clock, job, exchange, self._stream_interval, self._texts) as reader:
            await run_choices(self._generator, job.choices, job.deadline, reader)
        extra = self._extra(job, with_usage=job.envelope.include_usage)
        last = job.format.last_event(b"," + msgspec.json.encode(extra)[1:-1]) if extra else b""
        await exchange.end_events(last + DONE)

    async def _body(self, exchange: Exchange, job: Job) -> None:
        with _Collected(self._metrics, self._clock, job) as reader:
            await run_choices(self._generator, job.choices, job.deadline, reader)
        together = list(zip(job.choices, reader.pieces, strict=True))
        await exchange.respond(200, job.format.body(together, self._extra(job, with_usage=True)))

    def _extra(self, job: Job, *, with_usage: bool) -> dict[str, Any]:
        extra: dict[str, Any] = {"usage": usage(job.choices, job.num_hidden)} if with_usage else {}
        stream = job.choices[0].stream
        if job.envelope.timeline and stream is not None:
            extra["timeline"] = timeline_body(stream.timeline)
        return extra


class _Watch:
    """What both readers do: keep the metrics. One waiting or running request while entered, and what pieces show."""

    __slots__ = ("_clock", "_job", "_metrics", "_running")

    def __init__(self, metrics: Metrics, clock: Callable[[], float], job: Job) -> None:
        self._metrics = metrics
        self._clock = clock
        self._job = job
        self._running = False

    def __enter__(self) -> Self:
        self._metrics.num_waiting += 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._metrics.num_running -= 1
        else:
            self._metrics.num_waiting -= 1

    def _observe(self, piece: Piece) -> None:
        now, choice = self._clock(), piece.choice
        if not self._running:
            self._running = True
            self._metrics.num_waiting -= 1
            self._metrics.num_running += 1
            self._metrics.first_token.observe(now - self._job.received)
        elif not piece.first:
            self._metrics.inter_token.observe(now - choice.pace.piece_at)
        choice.pace.piece_at = now
        if piece.finish_reason is not None and choice.stream is not None:
            num_prompt = choice.request.num_prompt_tokens
            self._metrics.finish(choice.stream.timeline, num_prompt, choice.num_tokens, piece.finish_reason, now)


class _Events(_Watch):
    """The reader of a streamed answer."""

    __slots__ = ("_exchange", "_format", "_tail", "_texts", "interval")

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float],
        job: Job,
        exchange: Exchange,
        interval: int,
        texts: EventTexts,
    ) -> None:
        super().__init__(metrics, clock, job)
        self.interval = interval
        self._texts = texts
        self._exchange = exchange
        self._format = job.format
        self._tail: bytes | None = b',"usage":null' if job.envelope.include_usage else b""
        if job.envelope.continuous_usage:
            self._tail = None

    def take(self, piece: Piece) -> bool:
        self._observe(piece)
        tail = self._tail
        if tail is None:
            tail = b',"usage":' + _encode(usage(self._job.choices, self._job.num_hidden))
        last = piece.finish_reason is not None and all(choice.finish_reason for choice in self._job.choices)
        return self._exchange.write_events(self._format.event(piece, tail), last=last)

    def lone(self, choice: Choice) -> LoneTokens | None:
        if self._tail is None or self._format.extras:
            return None
        around, exchange = self._format.around(choice.index, self._tail), self._exchange
        lone = _LoneEvents(choice.text.decoder, self._metrics.inter_token, self._clock, exchange, around, self._texts)
        if len(self._job.choices) == 1:  # several would write to one connection
            assert choice.stream is not None
            lone.stream = choice.stream
            exchange.writer = lone
        choice.pace = lone
        return lone

    async def room(self) -> None:
        await self._exchange.flush()


class _Lone(Pace):
    """Lone tokens of a choice. Among many streams a processor's caches are cold at every token: so one has to touch few
    objects, and few of them are its own."""

    __slots__ = ("_clock", "_decoder", "inter_token")

    def __init__(self, decoder: Decoder, inter_token: Histogram, clock: Callable[[], float]) -> None:
        super().__init__()
        self._decoder = decoder
        self.inter_token = inter_token
        self._clock = clock

    def _text(self, token_id: int) -> str:
        text, now = self._decoder.push_token(token_id), self._clock()
        self.inter_token.observe(now - self.piece_at)
        self.piece_at = now
        self.num_lone += 1
        return text


class _LoneEvents(_Lone):
    """They become events; `around` is what stands around the text of each. Where they all have reached the client's
    connection, the next ones go there by a lane."""

    __slots__ = ("_exchange", "after", "before", "stream", "texts", "vocabulary")

    def __init__(
        self,
        decoder: Decoder,
        inter_token: Histogram,
        clock: Callable[[], float],
        exchange: Exchange,
        around: tuple[bytes, bytes],
        texts: EventTexts,
    ) -> None:
        super().__init__(decoder, inter_token, clock)
        self._exchange = exchange
        self.before, self.after = around
        self.texts = texts
        self.vocabulary = texts.vocabulary(decoder.pieces)
        self.stream: GenerationStream | None = None  # None: no lane

    def take(self, token_id: int) -> bool:
        decoder = self._decoder
        alone = decoder.at_rest
        text = self._text(token_id)
        if not text:
            return True
        shown = _encode(text)
        if alone and decoder.at_rest:
            self.texts.learn(self.vocabulary, token_id, shown)
        return self._exchange.write_events(b"".join((self.before, shown, self.after)))

    def written(self, descriptor: int) -> None:
        if self.stream is not None and self._decoder.at_rest:
            self.stream.open_lane(self, descriptor)

    def stop(self) -> None:
        if self.stream is not None:
            self.stream.close_lane()

    def lane_closed(self, num_tokens: int, last_at: float) -> None:
        self.num_lone += num_tokens
        self.piece_at = last_at

    def lane_broke(self, rest: bytes) -> None:
        self._exchange.write_rest(rest)


class _LoneTexts(_Lone):
    """They are kept for a body."""

    __slots__ = ("_texts",)

    def __init__(self, decoder: Decoder, inter_token: Histogram, clock: Callable[[], float]) -> None:
        super().__init__(decoder, inter_token, clock)
        self._texts: list[str] = []

    def take(self, token_id: int) -> bool:
        self._texts.append(self._text(token_id))
        return True

    def drain(self) -> str:
        text = "".join(self._texts)
        self._texts.clear()
        return text


class _Collected(_Watch):
    """The reader of an answer in one body: there is always room."""

    interval = 1

    def __init__(self, metrics: Metrics, clock: Callable[[], float], job: Job) -> None:
        super().__init__(metrics, clock, job)
        self.pieces: list[list[Piece]] = [[] for _ in job.choices]

    def take(self, piece: Piece) -> bool:
        self._observe(piece)
        choice, pieces = piece.choice, self.pieces[piece.choice.index]
        if isinstance(choice.pace, _LoneTexts) and (text := choice.pace.drain()):
            pieces.append(Piece(choice, text, [], [], None, first=False))
        pieces.append(piece)
        return True

    def lone(self, choice: Choice) -> LoneTokens | None:
        if self._job.format.extras:
            return None
        choice.pace = lone = _LoneTexts(choice.text.decoder, self._metrics.inter_token, self._clock)
        return lone

    async def room(self) -> None:
        pass
