"""What the engine costs around the executor: microseconds per decode step at several batch sizes.

Sequences decode through an executor that answers at once, so everything measured is scheduling, bookkeeping, block
growth and prefix-cache stores (each sequence completes a block every 16 steps).

    python benchmarks/engine_overhead.py --batch 1 --batch 64
"""

import argparse
import time
from collections.abc import Callable

from engine.engine import Engine
from engine.executors.base import Batch, FinishedStep, Sampled, StepResult
from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig

NUM_PROMPT_TOKENS = 512


class NullExecutor:
    """Answers token 5, reads nothing, and keeps its own time apart."""

    def __init__(self, num_blocks: int) -> None:
        self.layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=16, dtype="int32")
        self.memory = HostMemory(self.layout, num_blocks)
        self.layer_groups: tuple[int, ...] = (1,)
        self.vocab_size = 32_000
        self.max_model_len = 1 << 20
        self.eos_token_ids: tuple[int, ...] = (2,)
        self.model_hash = "null"
        self.max_in_flight = 1
        self.seconds = 0.0

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> FinishedStep:  # noqa: ARG002
        started = time.perf_counter()
        result = StepResult(
            [None if chunk.sample is None else Sampled(5) for chunk in batch.chunks], [None] * len(batch.chunks)
        )
        self.seconds += time.perf_counter() - started
        return FinishedStep(result)

    def close(self) -> None:
        self.memory.close()


def measure(num_sequences: int, num_steps: int) -> tuple[float, float]:
    """Median and mean microseconds of a step."""
    executor = NullExecutor(num_sequences * (NUM_PROMPT_TOKENS + num_steps + 64) // 16)
    engine = Engine(executor, SchedulerConfig(16_384, num_sequences), secret="s", model="m")
    for i in range(num_sequences):
        token_ids = tuple((i * 7 + j * j) % 30_000 for j in range(NUM_PROMPT_TOKENS))
        params = SamplingParams(max_tokens=num_steps + 50)
        engine.submit(Request(RequestId(str(i)), token_ids, NUM_PROMPT_TOKENS, params, seed=i))
    while engine.load().num_waiting_tokens:
        _step(engine)
    took = []
    for _ in range(num_steps):
        executor.seconds = 0.0
        started = time.perf_counter()
        _step(engine)
        engine.kv.drain_events()
        engine.load()
        took.append((time.perf_counter() - started - executor.seconds) * 1e6)
    executor.close()
    return sorted(took)[len(took) // 2], sum(took) / len(took)


def _step(engine: Engine) -> None:
    scheduled = engine.schedule()
    assert scheduled is not None
    engine.run(scheduled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=int, action="append", help="sequences decoding at once (default: 1, 16, 64, 256)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps to measure (default: %(default)s)")
    args = parser.parse_args()
    print(f"{'batch':>6} {'median us':>10} {'mean us':>10} {'us/sequence':>12}")
    for num_sequences in args.batch or (1, 16, 64, 256):
        median, mean = measure(num_sequences, args.steps)
        print(f"{num_sequences:>6} {median:>10.0f} {mean:>10.0f} {mean / num_sequences:>12.2f}")


if __name__ == "__main__":
    main()
