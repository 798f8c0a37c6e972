"""A timing model in place of the math, for router and cluster work with many workers on a small machine.

It keeps the token ids themselves as KV and makes the next token from what it reads back, so a handoff that moved
wrong bytes gives wrong tokens here too. Greedy and sampled requests get the same tokens.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xxhash import xxh3_64_intdigest

from engine.executors.base import Batch, Chunk, Sampled, SampleSpec, StepResult, TokenLogprobs
from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory
from engine.step_model import chunks_work
from engine.step_profile import StepProfile

NUM_LAST = 8  # keys read back for each token: the last positions
NUM_PROBES = 8  # values read back: positions spread evenly over the whole sequence, others in each step


@dataclass(frozen=True, slots=True)
class SimulatedConfig:
    """Speeds of the worker it stands for, and the sizes it pretends to have."""

    prefill_tokens_per_s: float = 20_000.0
    step_base_s: float = 0.005
    decode_s_per_sequence: float = 0.0001
    kv_read_tokens_per_s: float = 50e6
    profile: StepProfile | None = None  # measured steps, in place of these speeds
    vocab_size: int = 32_000
    first_token_id: int = 256  # it emits this id and above: those below are often control tokens
    eos_token_ids: tuple[int, ...] = ()  # emitted as any other token, so sequences end at random
    max_model_len: int = 32_768
    block_size: int = 16
    num_blocks: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.first_token_id < self.vocab_size:
            raise ValueError(f"first_token_id must be below vocab_size: {self}")


def step_seconds(config: SimulatedConfig, batch: Batch) -> float:
    """How long a step takes: what the profile says, or the sum of a base, the tokens of prompts, the sequences that
    decode, and the KV they read."""
    if config.profile is not None:
        return config.profile.step_seconds(chunks_work((chunk.start, len(chunk.token_ids)) for chunk in batch.chunks))
    num_prefill_tokens = num_decodes = num_read = 0
    for chunk in batch.chunks:
        if len(chunk.token_ids) == 1:
            num_decodes += 1
        else:
            num_prefill_tokens += len(chunk.token_ids)
        num_read += chunk.start
    return (
        config.step_base_s
        + num_prefill_tokens / config.prefill_tokens_per_s
        + num_decodes * config.decode_s_per_sequence
        + num_read / config.kv_read_tokens_per_s
    )


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """Computed, and not told before its time."""

    done: StepResult
    wait: Callable[[], None]
    on_group_done: Callable[[int], None] | None

    def result(self) -> StepResult:
        self.wait()
        if self.on_group_done is not None:
            self.on_group_done(0)
        return self.done


class SimulatedExecutor:
    """Implements engine.executors.base.Executor. `sleep` is how its time passes.

    With a `clock` two steps can be in flight, as on a GPU: the second one begins when the first one ends, whatever the
    caller does meanwhile.
    """

    def __init__(
        self, config: SimulatedConfig, sleep: Callable[[float], None], clock: Callable[[], float] | None = None
    ) -> None:
        self._config = config
        self._sleep = sleep
        self._clock = clock
        self._free_at = 0.0  # by the clock: when the steps submitted have been computed
        self._sampled: list[Sampled | None] = []  # by each chunk of the step submitted last
        self.layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=config.block_size, dtype="int32")
        self.memory = HostMemory(self.layout, config.num_blocks)
        self.layer_groups: tuple[int, ...] = (1,)
        self.vocab_size = config.vocab_size
        self.max_model_len = config.max_model_len
        self.eos_token_ids = config.eos_token_ids
        self.max_in_flight = 1 if clock is None else 2
        self.model_hash = f"simulated-{config.vocab_size}-{config.first_token_id}"
        self._slots = self.memory.buffer.cast("i")  # [block, k|v, slot]

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> SimulatedStep:
        chunks = [chunk if chunk.follows is None else self._following(chunk, chunk.follows) for chunk in batch.chunks]
        for chunk in chunks:
            self._write(chunk)
        sampled = [None if chunk.sample is None else self._next(chunk, chunk.sample) for chunk in chunks]
        prompt_logprobs = [
            None if chunk.prompt_logprobs is None else [TokenLogprobs(each, 0.0) for each in chunk.next_token_ids]
            for chunk in chunks
        ]
        self._sampled = sampled
        wait = self._waiting(step_seconds(self._config, batch))
        return SimulatedStep(StepResult(sampled, prompt_logprobs), wait, on_group_done)

    def _following(self, chunk: Chunk, row: int) -> Chunk:
        """With the token that was sampled last."""
        last = self._sampled[row]
        assert last is not None, chunk
        return replace(chunk, token_ids=(last.token_id,))

    def _waiting(self, seconds: float) -> Callable[[], None]:
        """Lets the time of a step pass that is submitted now."""
        clock = self._clock
        if clock is None:
            return partial(self._sleep, seconds)
        ends = self._free_at = max(self._free_at, clock()) + seconds
        return lambda: self._sleep(max(0.0, ends - clock()))

    def close(self) -> None:
        self._slots.release()
        self.memory.close()

    def _write(self, chunk: Chunk) -> None:
        """The tokens, both as keys and as values, in runs of one block."""
        size = self._config.block_size
        tokens = array("i", chunk.token_ids)
        done = 0
        while done < len(tokens):
            block, slot = divmod(chunk.start + done, size)
            count = min(size - slot, len(tokens) - done)
            at = chunk.block_ids[block] * 2 * size + slot
            self._slots[at : at + count] = self._slots[at + size : at + size + count] = tokens[done : done + count]
            done += count

    def _next(self, chunk: Chunk, spec: SampleSpec) -> Sampled:
        """A hash of the position and of what the KV blocks say, the banned tokens left out."""
        size, slots, block_ids = self._config.block_size, self._slots, chunk.block_ids
        end = chunk.end
        keys = range(max(0, end - NUM_LAST), end)
        # Golden-ratio steps: within a few tokens every stretch of the sequence has been looked at.
        offset = (end * 0x9E3779B1 % (1 << 32)) * end // NUM_PROBES >> 32
        probes = [offset + i * end // NUM_PROBES for i in range(NUM_PROBES)]
        seen = [slots[block_ids[at // size] * 2 * size + at % size] for at in keys]
        seen += [slots[(block_ids[at // size] * 2 + 1) * size + at % size] for at in probes]
        digest = xxh3_64_intdigest(array("i", seen).tobytes(), end)
        first, num = self._config.first_token_id, self.vocab_size - self._config.first_token_id
        token_id = first + digest % num
        for _ in range(num):
            if token_id not in spec.banned_token_ids:
                break
            token_id = first + (token_id - first + 1) % num
        wanted = spec.params.logprobs
        return Sampled(token_id, None if wanted is None else TokenLogprobs(token_id, 0.0, ((token_id, 0.0),)[:wanted]))
