# NOTE to builder "core": a temporary bridge by the lead; replace it with yours (same names).
"""A timing model in place of the math, for router and cluster work with many workers on a small machine.

It keeps the token ids themselves as KV and reads them back to make the next token, so a handoff that moved wrong
bytes gives wrong tokens here too. The pool's memory is a few bytes a token.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from engine.executors.base import Batch, Chunk, Sampled, StepResult, TokenLogprobs
from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory

NUM_READ_BACK = 8  # the next token depends on this many last tokens


@dataclass(frozen=True, slots=True)
class SimulatedConfig:
    """Speeds of the worker it stands for, and the sizes it pretends to have."""

    prefill_tokens_per_s: float = 20_000.0
    step_base_s: float = 0.005
    decode_s_per_sequence: float = 0.0001
    kv_read_tokens_per_s: float = 50e6
    vocab_size: int = 32_000
    first_token_id: int = 256  # tokens it emits are this or above, where the vocabulary has that many
    max_model_len: int = 32_768
    block_size: int = 16
    num_blocks: int = 4096


def step_seconds(config: SimulatedConfig, batch: Batch) -> float:
    """How long a step takes: a base, the tokens of prompts, the sequences that decode, and the KV that is read."""
    prefill = sum(len(chunk.token_ids) for chunk in batch.chunks if len(chunk.token_ids) > 1)
    num_decodes = sum(len(chunk.token_ids) == 1 for chunk in batch.chunks)
    kv_tokens = sum(chunk.start for chunk in batch.chunks)
    return (
        config.step_base_s
        + prefill / config.prefill_tokens_per_s
        + num_decodes * config.decode_s_per_sequence
        + kv_tokens / config.kv_read_tokens_per_s
    )


class SimulatedExecutor:
    """Implements engine.executors.base.Executor. `sleep` is how its time passes."""

    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, config: SimulatedConfig, sleep: Callable[[float], None]) -> None:
        self._config = config
        self._sleep = sleep
        self.layout = KvLayout(1, 1, 1, config.block_size, "int32")
        self.memory = HostMemory(self.layout, config.num_blocks)
        self.layer_groups: tuple[int, ...] = (1,)
        self.vocab_size = config.vocab_size
        self.max_model_len = min(config.max_model_len, config.num_blocks * config.block_size)
        self.model_hash = f"simulated-{config.vocab_size}"
        self._slots = self.memory.buffer.cast("i")  # [block, k|v, slot]

    def step(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> StepResult:
        for chunk in batch.chunks:
            self._write(chunk)
        if (seconds := step_seconds(self._config, batch)) > 0:
            self._sleep(seconds)
        if on_group_done is not None:
            on_group_done(0)
        sampled = [self._next(chunk) if chunk.sample is not None else None for chunk in batch.chunks]
        prompt_logprobs = [
            None if chunk.prompt_logprobs is None else [TokenLogprobs(each, 0.0) for each in chunk.next_token_ids]
            for chunk in batch.chunks
        ]
        return StepResult(sampled, prompt_logprobs)

    def close(self) -> None:
        self._slots.release()
        self.memory.close()

    def _write(self, chunk: Chunk) -> None:
        """Token ids as keys, in runs of one block."""
        size = self._config.block_size
        tokens = array("i", chunk.token_ids)
        done = 0
        while done < len(tokens):
            block, slot = divmod(chunk.start + done, size)
            count = min(size - slot, len(tokens) - done)
            at = chunk.block_ids[block] * 2 * size + slot
            self._slots[at : at + count] = tokens[done : done + count]
            done += count

    def _next(self, chunk: Chunk) -> Sampled:
        """A hash of the last tokens, as the KV blocks have them, and of the position."""
        assert chunk.sample is not None
        size = self._config.block_size
        end = chunk.start + len(chunk.token_ids)
        read_back = array("i")
        for position in range(max(0, end - NUM_READ_BACK), end):
            block, slot = divmod(position, size)
            read_back.append(self._slots[chunk.block_ids[block] * 2 * size + slot])
        digest = xxhash.xxh3_64_intdigest(read_back.tobytes(), end)
        first = min(self._config.first_token_id, self.vocab_size - 1)
        token_id = first + digest % (self.vocab_size - first)
        wanted = chunk.sample.params.logprobs
        return Sampled(token_id, None if wanted is None else TokenLogprobs(token_id, 0.0, ((token_id, 0.0),)[:wanted]))
