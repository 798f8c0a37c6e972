"""The choices of one API request: each is one engine request, and together they are pieces of text for one answer.

Choices of the same prompt start after the first of them has produced a token, so that they find the prompt in the
prefix cache. Pieces are handed over where their tokens arrive, with no task in between. Invariant: every generation
that was started is closed when `run_choices` ends, however it ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request
from router.detokenizer import TextStream
from router.generation import Delta, GenerationFailed, GenerationStream, Generator, RouteHints
from router.prompts import Prompt


@dataclass(slots=True)
class Choice:
    """`leader` is the choice whose first token this one waits for; None for the first of a prompt."""

    index: int
    prompt: Prompt
    request: Request
    text: TextStream
    hints: RouteHints
    leader: "Choice | None" = None
    stream: GenerationStream | None = None  # once started
    finish_reason: FinishReason | None = None


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one delta added to a choice. `token_ids` and `logprobs` are those that count, up to a stop string."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    first: bool


@dataclass(frozen=True, slots=True)
class Reader:
    """Who wants the pieces. `take` is called where the tokens arrive and must not block; False: no more before `room`
    has returned."""

    take: Callable[[Piece], bool]
    room: Callable[[], Awaitable[None]]


async def run_choices(generator: Generator, choices: Sequence[Choice], deadline: float, reader: Reader) -> None:
    """Run the choices to their ends. Raises what GenerationStream and the reader raise."""
    try:
        for choice in choices:
            if choice.leader is None:
                choice.stream = generator.start(choice.request, deadline, choice.hints)
        if len(choices) == 1:
            await _run(choices[0], reader)
        else:
            await _run_all(generator, choices, deadline, reader)
    finally:
        for choice in choices:
            if choice.stream is not None:
                await choice.stream.aclose()


async def _run(choice: Choice, reader: Reader, begun: Callable[[], object] = lambda: None) -> None:
    """A choice whose stream is there, to its end; `begun` is called with its first piece."""
    stream, show, first, has_room = choice.stream, reader.take, True, True
    assert stream is not None, choice.index

    def take(delta: Delta) -> bool:
        nonlocal first, has_room
        piece = _take(choice, delta, first)
        if first:
            first = False
            begun()
        has_room = show(piece)
        return has_room and piece.finish_reason is None

    while choice.finish_reason is None:
        await stream.forward(take)
        if choice.finish_reason is not None:
            break
        if has_room:
            raise GenerationFailed("the stream ended without a finish reason")
        await reader.room()
        has_room = True
    await stream.aclose()


async def _run_all(generator: Generator, choices: Sequence[Choice], deadline: float, reader: Reader) -> None:
    begun = {choice.index: asyncio.Event() for choice in choices if choice.leader is None}

    async def run(choice: Choice) -> None:
        if choice.leader is None:
            await _run(choice, reader, begun[choice.index].set)
        else:
            await begun[choice.leader.index].wait()
            choice.stream = generator.start(choice.request, deadline, choice.hints)
            await _run(choice, reader)

    tasks = [asyncio.create_task(run(choice)) for choice in choices]
    try:
        for task in asyncio.as_completed(tasks):
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _take(choice: Choice, delta: Delta, first: bool) -> Piece:
    text, token_ids, reason = choice.text, delta.token_ids, delta.finish_reason
    before = text.num_tokens
    shown = text.push(token_ids, reason)
    if reason is None and not text.stopped:
        return Piece(choice, shown, token_ids, delta.logprobs, None, first)
    if text.stopped:
        reason = FinishReason.STOP
        num_new = text.num_tokens - before
        if num_new < len(token_ids):
            choice.finish_reason = reason
            return Piece(choice, shown, token_ids[:num_new], delta.logprobs[:num_new], reason, first)
    choice.finish_reason = reason
    return Piece(choice, shown, token_ids, delta.logprobs, reason, first)
