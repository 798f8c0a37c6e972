"""The choices of one API request: each is one engine request, and together one stream of pieces of text.

Choices of the same prompt start after the first of them has produced a token, so that they find the prompt in the
prefix cache. Invariant: every generation that was started is closed when the iteration ends, however it ends, and
at once when a stop string is found.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request
from router.detokenizer import TextStream
from router.generation import Delta, GenerationFailed, GenerationStream, Generator
from router.prompts import Prompt


@dataclass(slots=True)
class Choice:
    """`leader` is the choice whose first token this one waits for; None for the first of a prompt."""

    index: int
    prompt: Prompt
    request: Request
    text: TextStream
    leader: "Choice | None" = None
    stream: GenerationStream | None = None  # once started
    finish_reason: FinishReason | None = None


class Piece(msgspec.Struct, frozen=True):
    """What one delta added to a choice. `token_ids` and `logprobs` are those that count, up to a stop string."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    first: bool


def pieces(generator: Generator, choices: Sequence[Choice], deadline: float) -> AsyncIterator[Piece]:
    """Run the choices; iterate inside `aclosing`. Raises what GenerationStream raises."""
    return _one(generator, choices[0], deadline) if len(choices) == 1 else _many(generator, choices, deadline)


async def _one(generator: Generator, choice: Choice, deadline: float) -> AsyncIterator[Piece]:
    stream = choice.stream = choice.stream or generator.start(choice.request, deadline)
    try:
        first = True
        async for delta in stream:
            piece = _take(choice, delta, first)
            if choice.text.stopped:
                await stream.aclose()
            yield piece
            if piece.finish_reason is not None:
                return
            first = False
    finally:
        await stream.aclose()
    raise GenerationFailed("the stream ended without a finish reason")


async def _many(generator: Generator, choices: Sequence[Choice], deadline: float) -> AsyncIterator[Piece]:
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=2 * len(choices))
    begun = {choice.index: asyncio.Event() for choice in choices if choice.leader is None}
    tasks: list[asyncio.Task[None]] = []

    async def pump(choice: Choice) -> None:
        try:
            if choice.leader is not None:
                await begun[choice.leader.index].wait()
            async with aclosing(_one(generator, choice, deadline)) as parts:  # type: ignore[type-var]
                async for piece in parts:
                    if choice.leader is None:
                        begun[choice.index].set()
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # handed to the reader, who raises it
            await queue.put(error)

    try:
        for choice in choices:
            if choice.leader is None:
                choice.stream = generator.start(choice.request, deadline)
        tasks += [asyncio.create_task(pump(choice)) for choice in choices]
        num_left = len(choices)
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for choice in choices:
            if choice.stream is not None:
                await choice.stream.aclose()


def _take(choice: Choice, delta: Delta, first: bool) -> Piece:
    text = choice.text
    before = text.num_tokens
    shown = text.push(delta.token_ids, delta.finish_reason)
    choice.finish_reason = FinishReason.STOP if text.stopped else delta.finish_reason
    num_new = text.num_tokens - before
    if num_new == len(delta.token_ids):
        return Piece(choice, shown, delta.token_ids, delta.logprobs, choice.finish_reason, first)
    return Piece(choice, shown, delta.token_ids[:num_new], delta.logprobs[:num_new], choice.finish_reason, first)
