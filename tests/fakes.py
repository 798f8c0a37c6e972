"""Stand-ins for what a test wants to control: time, and the math of a model."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engine.executors.base import Batch, Chunk, Executor, FinishedStep, PendingStep, Sampled, StepResult
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor


class FakeClock:
    """A monotonic clock that moves only when told; `sleep` moves it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0, seconds
        self.now += seconds

    advance = sleep


def instant_executor(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 1024,
    vocab_size: int = 1000,
    clock: Callable[[], float] | None = None,
) -> SimulatedExecutor:
    """A simulated executor whose steps take no time: real KV bytes, tokens that depend on them."""
    config = SimulatedConfig(
        prefill_tokens_per_s=1e12,
        step_base_s=0.0,
        decode_s_per_sequence=0.0,
        kv_read_tokens_per_s=1e12,
        vocab_size=vocab_size,
        first_token_id=10,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
    )
    return SimulatedExecutor(config, lambda _seconds: None, clock)


@dataclass
class LateStep:
    result: Callable[[], StepResult]


class LateExecutor:
    """Another executor with two steps in flight, each computed as late as it may be: when its result is asked for."""

    max_in_flight = 2

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> LateStep:
        batch = Batch([_copy(chunk) for chunk in batch.chunks])
        return LateStep(lambda: self._inner.submit(batch, on_group_done).result())


def _copy(chunk: Chunk) -> Chunk:
    """As it is now: its sequences may change once `submit` has returned."""
    spec = chunk.sample and replace(chunk.sample, token_ids=tuple(chunk.sample.token_ids))
    return replace(chunk, token_ids=tuple(chunk.token_ids), block_ids=tuple(chunk.block_ids), sample=spec)


class ScriptedExecutor:
    """An instant executor whose every step is noted, and whose tokens may be dictated.

    `choose(chunk)` gives the token to sample; None leaves it to the simulation. A step asserts that no two chunks
    write into the same block and that all before a chunk has been written, so wrong scheduling fails at once.

    With two steps in flight each computes as late as it may: when its result is asked for.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 1024,
        vocab_size: int = 1000,
        eos_token_ids: tuple[int, ...] = (),
        choose: Callable[[Chunk], int | None] = lambda _chunk: None,
        max_in_flight: int = 1,
    ) -> None:
        self._inner = instant_executor(
            num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len, vocab_size=vocab_size
        )
        weakref.finalize(self, self._inner.close)  # a test may make hundreds
        self.layout = self._inner.layout
        self.memory = self._inner.memory
        self.layer_groups = self._inner.layer_groups
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.model_hash = self._inner.model_hash
        self.max_in_flight = max_in_flight
        self._num_in_flight = 0
        self._last: StepResult | None = None
        self.steps: list[list[tuple[str, int, int]]] = []  # (request, start, number of tokens) of each chunk
        self._choose = choose

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> PendingStep:
        self._num_in_flight += 1
        assert self._num_in_flight <= self.max_in_flight
        batch = Batch([replace(chunk, block_ids=tuple(chunk.block_ids)) for chunk in batch.chunks])
        late = LateStep(lambda: self._run(batch, on_group_done))
        return late if self.max_in_flight > 1 else FinishedStep(late.result())

    def _run(self, batch: Batch, on_group_done: Callable[[int], None] | None) -> StepResult:
        self._num_in_flight -= 1
        batch = Batch([self._known(chunk) for chunk in batch.chunks])
        self._check_writes(batch)
        self.steps.append([(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in batch.chunks])
        result = self._inner.submit(batch, on_group_done).result()
        chosen = [self._choose(chunk) for chunk in batch.chunks]
        sampled = [
            each if each is None or token_id is None else Sampled(token_id, each.logprobs)
            for each, token_id in zip(result.sampled, chosen, strict=True)
        ]
        self._last = StepResult(sampled, result.prompt_logprobs)
        return self._last

    def _known(self, chunk: Chunk) -> Chunk:
        """Put the token sampled in the step before in its place."""
        if chunk.follows is None:
            return chunk
        assert self._last is not None
        sampled = self._last.sampled[chunk.follows]
        assert sampled is not None
        return replace(chunk, token_ids=[sampled.token_id])

    def close(self) -> None:
        """The memory goes with this object, as `step` needs it."""

    def _check_writes(self, batch: Batch) -> None:
        written: set[int] = set()
        size = self.layout.block_size
        for chunk in batch.chunks:
            assert chunk.token_ids, chunk
            end = chunk.start + len(chunk.token_ids)
            blocks = set(chunk.block_ids[chunk.start // size : -(-end // size)])
            assert not blocks & written, f"two sequences write into blocks {blocks & written}"
            written |= blocks
        for chunk in batch.chunks:
            before = set(chunk.block_ids[: chunk.start // size])
            assert not before & written, f"{chunk.request_id} reads blocks {before & written} that this step writes"
