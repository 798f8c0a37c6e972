"""The one call a worker loop makes: `Executor.submit(batch)`, whose `result()` is the step's StepResult.

A batch is plain data: a leader can broadcast it to the ranks of its group. The executor keeps nothing
about requests between steps, except the tokens sampled last; the KV blocks are its only memory, and the
scheduler says which to use.

Where a device computes while Python goes on, a step is submitted before the one before it has been read
(`max_in_flight` 2). Its chunks then may follow tokens that are still on the device (`Chunk.follows`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.kv.layout import KvLayout
from engine.request import RequestId, SamplingParams

if TYPE_CHECKING:  # the scheduler, which is pure, imports this module for its batch types
    from engine.kv.memory import KvMemory


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What sampling one token depends on, besides the logits. Nothing about batch mates or time.

    `token_ids` is everything known before the token to sample (prompt, then output), for penalties; it is complete
    where they are asked for. The position sampled, which with `seed` fixes the random draw, is the chunk's end.
    """

    params: SamplingParams
    seed: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    banned_token_ids: tuple[int, ...] = ()  # end tokens while min_tokens is not reached


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes.

    The step writes the KV of positions `start .. start + len(token_ids) - 1` into `block_ids`, whose
    i-th entry holds positions `i * block_size ..`; positions before `start` are there already. The sequences may
    change once `submit` has returned.
    """

    request_id: RequestId
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sample: SampleSpec | None = None  # sample a token from the last position's logits
    prompt_logprobs: int | None = None  # alternatives for each of next_token_ids
    next_token_ids: Sequence[int] = ()  # with prompt_logprobs: what follows each of token_ids in the prompt;
    # one shorter than token_ids where the prompt ends with this chunk
    follows: int | None = None  # the one token is what this chunk of the batch submitted before samples

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    chunks: Sequence[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, its log probability, and the most likely alternatives, most likely first.

    Log probabilities are of the model's own distribution, before temperature, penalties and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None  # when params.logprobs is not None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Aligned with `batch.chunks`."""

    sampled: Sequence[Sampled | None]
    prompt_logprobs: Sequence[Sequence[TokenLogprobs] | None]


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step. Called once for each step, in the order of `submit`."""
        ...


class Executor(Protocol):
    """Owns the model's weights and the KV memory of one worker. One thread makes all calls.

    `layer_groups` are exclusive end layers, ascending; the last is `layout.num_layers`. With `on_group_done`, it is
    called with each group's index once the KV of that group is in place for every chunk of the batch: in order, at
    once if there is a thread's time for it, from inside `submit` or `result`.
    """

    layout: KvLayout
    layer_groups: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    model_hash: str  # equal only for equal weights and configuration
    max_in_flight: int  # steps submitted whose results have not been taken: 1 or 2

    @property
    def memory(self) -> "KvMemory": ...

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> PendingStep: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The PendingStep of an executor that computes inside `submit`."""

    done: StepResult

    def result(self) -> StepResult:
        return self.done
