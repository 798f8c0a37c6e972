"""How long a step takes, as a sum over what it computes, and the fit of that sum to a worker's own steps.

Pure: no clock. A worker calibrates its model while it runs and reports it; the router turns tokens into seconds by it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

# Weights of past steps halve every 700 steps: seconds to a minute of work, so that the fit follows a changed load.
FORGETTING = 0.999
MIN_STEPS = 8  # before a fit is worth saying
_SWEEPS = 25  # of the solver, which starts from its last answer
# Where steps have been too alike to tell, what is first here explains them: work is taken to cost something.
_ORDER = (1, 3, 0, 2, 4)
# Features are measured in these units, so that their coefficients are of like size.
_UNITS = (1.0, 1e3, 1e6, 1e2, 1e5)
_NUM = len(_UNITS)


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """What one step computes, or what is left to compute."""

    prefill_tokens: int = 0
    pairs: int = 0  # of a prompt's token and a key it attends to
    decodes: int = 0  # sequences that get one token
    kv_tokens: int = 0  # that those read


def num_pairs(num_tokens: int, past: int) -> int:
    """(query, key) pairs of `num_tokens` that follow `past` others, by causal attention."""
    return num_tokens * past + num_tokens * (num_tokens + 1) // 2


def chunks_work(chunks: Iterable[tuple[int, int]]) -> StepWork:
    """Of a step's chunks, as (tokens before it, tokens): one of a single token decodes."""
    prefill_tokens = pairs = decodes = kv_tokens = 0
    for start, num_tokens in chunks:
        if num_tokens == 1:
            decodes += 1
            kv_tokens += start
        else:
            prefill_tokens += num_tokens
            pairs += num_pairs(num_tokens, start)
    return StepWork(prefill_tokens, pairs, decodes, kv_tokens)


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds for each thing a step computes; `base_s` for the step itself."""

    base_s: float
    prefill_token_s: float
    pair_s: float
    decode_s: float
    kv_token_s: float

    def seconds(self, work: StepWork) -> float:
        return (
            self.base_s
            + self.prefill_token_s * work.prefill_tokens
            + self.pair_s * work.pairs
            + self.decode_s * work.decodes
            + self.kv_token_s * work.kv_tokens
        )


class Calibration:
    """Least squares with forgetting, of relative errors, so that short steps count as much as long ones and a pause
    of the process counts little. No coefficient is negative; what has not been seen costs nothing."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._products = [[0.0] * _NUM for _ in range(_NUM)]
        self._targets = [0.0] * _NUM
        self._solution = [0.0] * _NUM

    def observe(self, work: StepWork, seconds: float) -> None:
        if seconds <= 0.0:
            return
        self._num_steps += 1
        counts = (1, work.prefill_tokens, work.pairs, work.decodes, work.kv_tokens)
        row = [count / (unit * seconds) for count, unit in zip(counts, _UNITS, strict=True)]
        for i, value in enumerate(row):
            self._targets[i] = FORGETTING * self._targets[i] + value
            products = self._products[i]
            for j, other in enumerate(row):
                products[j] = FORGETTING * products[j] + value * other

    def fit(self) -> StepModel | None:
        """None until some steps have been seen. Some 200 us."""
        if self._num_steps < MIN_STEPS:
            return None
        solution = self._solution
        for _ in range(_SWEEPS):  # coordinate descent: each coefficient at its best for the others, or 0
            for i in _ORDER:
                products = self._products[i]
                if products[i] > 0.0:
                    rest = sum(products[j] * solution[j] for j in range(_NUM)) - products[i] * solution[i]
                    solution[i] = max(0.0, (self._targets[i] - rest) / products[i])
        return StepModel(*(value / unit for value, unit in zip(solution, _UNITS, strict=True)))
