"""The choices of one API request: each is one engine request, and together they are pieces of text for one answer.

Choices of the same prompt start after the first of them has produced a token, so that they find the prompt in the
prefix cache. Pieces are handed over where their tokens arrive, with no task in between. Invariant: every generation
that was started is closed when `run_choices` ends, however it ends.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request
from router.detokenizer import TextStream
from router.generation import Delta, GenerationFailed, GenerationStream, Generator, LoneTokens, RouteHints
from router.prompts import Prompt


class Pace:
    """When the last piece of a choice came, in monotonic seconds, and how many of its tokens went to the decoder of its
    text directly. Whoever takes lone tokens may put one of its own in the place of the choice's."""

    __slots__ = ("num_lone", "piece_at")

    def __init__(self) -> None:
        self.num_lone = 0
        self.piece_at = 0.0


class Choice(msgspec.Struct, eq=False):
    """`leader` is the choice whose first token this one waits for; None for the first of a prompt."""

    index: int
    prompt: Prompt
    request: Request
    text: TextStream
    hints: RouteHints
    leader: "Choice | None" = None
    stream: GenerationStream | None = None  # once started
    finish_reason: FinishReason | None = None
    pace: Pace = msgspec.field(default_factory=Pace)

    @property
    def num_tokens(self) -> int:
        """Of its output, up to a stop string."""
        return self.text.num_tokens + self.pace.num_lone


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one delta added to a choice. `token_ids` and `logprobs` are those that count, up to a stop string."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    first: bool


class Reader(Protocol):
    """Who wants the pieces, of `interval` tokens or more each, but for the first and the last of a choice."""

    interval: int

    def lone(self, choice: Choice) -> LoneTokens | None:
        """Who may get, in place of `take`, tokens of a choice that are pieces by themselves, neither its first nor its
        last, where no stop strings are looked for."""
        ...

    def take(self, piece: Piece) -> bool:
        """Called where the tokens arrive; must not block. False: no more before `room` has returned."""
        ...

    async def room(self) -> None: ...


async def run_choices(generator: Generator, choices: Sequence[Choice], deadline: float, reader: Reader) -> None:
    """Run the choices to their ends. Raises what GenerationStream and the reader raise."""
    try:
        for choice in choices:
            if choice.leader is None:
                choice.stream = generator.start(choice.request, deadline, choice.hints)
        if len(choices) == 1:
            await _Run(choices[0], reader).to_end()
        else:
            await _run_all(generator, choices, deadline, reader)
    finally:
        for choice in choices:
            if choice.stream is not None:
                await choice.stream.aclose()


class _Run:
    """A choice whose stream is there, to its end; `begun` is called with its first piece."""

    __slots__ = ("_begun", "_choice", "_first", "_reader")

    def __init__(self, choice: Choice, reader: Reader, begun: Callable[[], object] = lambda: None) -> None:
        self._choice = choice
        self._reader = reader
        self._begun = begun
        self._first = True

    async def to_end(self) -> None:
        choice, stream = self._choice, self._choice.stream
        assert stream is not None, choice.index
        lone = None if choice.text.looks_for_stops else self._reader.lone(choice)
        while True:
            more = await stream.forward(self._take, lone, interval=self._reader.interval)
            if choice.finish_reason is not None:
                break
            if not more:
                raise GenerationFailed("the stream ended without a finish reason")
            await self._reader.room()
        await stream.aclose()

    def _take(self, delta: Delta) -> bool:
        choice, token_ids, logprobs, reason = self._choice, delta.token_ids, delta.logprobs, delta.finish_reason
        text, first = choice.text, self._first
        before = text.num_tokens
        shown = text.push(token_ids, reason)
        if text.stopped:
            reason, num_new = FinishReason.STOP, text.num_tokens - before
            if num_new < len(token_ids):
                token_ids, logprobs = token_ids[:num_new], logprobs[:num_new]
        if reason is not None:
            choice.finish_reason = reason
        if first:
            self._first = False
            self._begun()
        has_room = self._reader.take(Piece(choice, shown, token_ids, logprobs, reason, first))
        return has_room and reason is None


async def _run_all(generator: Generator, choices: Sequence[Choice], deadline: float, reader: Reader) -> None:
    begun = {choice.index: asyncio.Event() for choice in choices if choice.leader is None}

    async def run(choice: Choice) -> None:
        if choice.leader is None:
            await _Run(choice, reader, begun[choice.index].set).to_end()
        else:
            await begun[choice.leader.index].wait()
            choice.stream = generator.start(choice.request, deadline, choice.hints)
            await _Run(choice, reader).to_end()

    tasks = [asyncio.create_task(run(choice)) for choice in choices]
    try:
        for task in asyncio.as_completed(tasks):
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
