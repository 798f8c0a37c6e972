"""What `LLM` takes and gives: jobs in, increments and finished outputs out. Plain data, no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.executors.base import TokenLogprobs
from engine.request import SamplingParams

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, as in the OpenAI API


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the checkpoint's chat template turns into a prompt."""

    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt (text, token ids or a conversation) and how to continue it."""

    prompt: str | Sequence[int] | Conversation
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the `n` choices. `stop_reason` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything about one finished prompt.

    `prompt_logprobs`, when asked for, is aligned with `prompt_token_ids`: the first token has none.
    """

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class Increment:
    """What came after the previous increment of the same choice; `finish_reason` is on the choice's last."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    stop_reason: str | int | None = None


Ended = RequestOutput | Exception
OnEnd = Callable[[Ended], None]
OnEvent = Callable[[Increment | Exception | None], None]  # None: the end


class Backend(Protocol):
    """Where the tokens come from: the engine in this process, or a server.

    `complete` calls back once, with the output or with what went wrong; `stream` with each increment, then once with
    None or with what went wrong. Calls come from the caller's thread or one of the backend's own. Both return a
    function that cancels the request; after it nobody may count on another call.
    """

    model: str  # its name there
    max_in_flight: int  # jobs worth having under way at once

    def complete(self, job: Job, on_end: OnEnd) -> Callable[[], None]: ...

    def stream(self, job: Job, on_event: OnEvent) -> Callable[[], None]: ...

    def close(self) -> None: ...
