"""The engine of a simulated worker: the real scheduler and KV cache, and a measured profile in place of an executor.

As engine.engine.Engine with one step in flight. Steps that only decode are advanced several at a time.
"""

from collections.abc import Callable, Iterable
from itertools import chain, count

import msgspec

from cluster.simulation.sequence import SimulatedRequest, SimulatedSequence
from engine.errors import InvalidRequest
from engine.kv.cache import KvCache
from engine.kv.layout import BlockId
from engine.request import Request
from engine.scheduler import EngineLoad, Plan, Scheduler, SchedulerConfig
from engine.step_model import StepWork, chunks_work

StepSeconds = Callable[[StepWork], float]
Step = Plan[SimulatedSequence]


class SimulatedEngine:
    """Implements decode_workers.intake.IntakeEngine. Contents of blocks are never compared: hashes are names here."""

    def __init__(self, num_blocks: int, block_size: int, max_len: int, config: SchedulerConfig) -> None:
        self.kv = KvCache(num_blocks, block_size, lambda _token_ids, first, end: (b"",) * (end - first))
        self.max_len = max_len
        self._scheduler: Scheduler[SimulatedSequence] = Scheduler(config, self.kv)
        self._arrivals = count()

    @property
    def short_of_blocks(self) -> bool:
        return self._scheduler.short_of_blocks

    @property
    def num_decoding(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_sequences(self) -> int:
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    def check(self, request: Request) -> None:
        if len(request.token_ids) >= self.max_len:
            raise InvalidRequest("the prompt is too long", code="context_length_exceeded")

    def hashes(self, request: Request) -> list[int]:
        assert isinstance(request, SimulatedRequest), request
        return list(request.hashes[: len(request.token_ids) // self.kv.block_size])

    def submit(self, request: SimulatedRequest, *, decodes: bool) -> SimulatedSequence:
        """Raises InvalidRequest."""
        self.check(request)
        sequence = self._enter(request, decodes=decodes)
        self._scheduler.add(sequence)
        return sequence

    def resume(self, request: SimulatedRequest, block_ids: list[BlockId]) -> SimulatedSequence:
        """The KV of all but its last token is in `block_ids`, whose references become the engine's."""
        sequence = self._enter(request, decodes=True, resumed=True)
        sequence.block_ids = list(block_ids)
        sequence.num_computed_tokens = sequence.num_tokens - 1
        self._store(sequence)
        self._scheduler.join(sequence)
        return sequence

    def leave(self, sequence: SimulatedSequence) -> None:
        self._scheduler.remove(sequence)
        self.kv.release(sequence.block_ids)

    def plan(self) -> Step:
        return self._scheduler.plan()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def num_alike(self, step: Step, limit: int) -> int:
        """How many steps like this one, at most `limit`, come one after the other if nothing comes from outside:
        all of it decodes, nobody finishes before the last of them, and there are blocks for all of them."""
        work, size = step.work, self.kv.block_size
        if (
            self._scheduler.short_of_blocks
            or len(work) < len(self._scheduler.running)
            or step.started
            or step.preempted
        ):
            return 1
        for sequence, _ in work:
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed_tokens > 1:
                return 1
            limit = min(limit, sequence.max_planned_tokens - num_tokens)
        if self.kv.num_free >= len(work) * (limit // size + 1):
            return limit
        return 1

    def advance(self, step: Step, num_steps: int) -> list[SimulatedSequence]:
        """The step has been computed, and `num_steps - 1` like it. Returns those that have got tokens."""
        size, sampled = self.kv.block_size, []
        for sequence, num_tokens in step.work:
            before = sequence.num_computed_tokens
            end = before + num_tokens
            if end == len(sequence.token_ids):
                end += num_steps - 1
                sequence.token_ids = range(end + 1)
                sampled.append(sequence)
                lacking = -(-end // size) - len(sequence.block_ids)
                if lacking > 0:  # of the steps after the first, for which the scheduler has seen to it
                    fresh = self.kv.allocate(lacking)
                    assert fresh is not None, (lacking, self.kv.num_free)
                    sequence.block_ids += fresh
            sequence.num_computed_tokens = end
            if end // size > before // size:
                self._store(sequence)
        return sampled

    def check_invariants(self, others: Iterable[BlockId] = ()) -> None:
        sequences = chain(self._scheduler.running, self._scheduler.waiting)
        self.kv.check_invariants(chain((block for each in sequences for block in each.block_ids), others))

    def _enter(self, request: SimulatedRequest, *, decodes: bool, resumed: bool = False) -> SimulatedSequence:
        num_tokens = len(request.token_ids)
        turn = self._scheduler.turns.take(request.priority, request.tenant, 0 if resumed else num_tokens)
        last = request.num_total_tokens if decodes else num_tokens + 1
        assert last <= self.max_len, (last, self.max_len)
        return SimulatedSequence(request, turn, next(self._arrivals), num_tokens, last)

    def _store(self, sequence: SimulatedSequence) -> None:
        kv = self.kv
        kv.release(kv.store(sequence.token_ids, sequence.hashes, sequence.block_ids, sequence.num_computed_tokens))


def step_work(step: Step, num_steps: int) -> StepWork:
    """Of one of these steps, as they are in the mean."""
    work = chunks_work((sequence.num_computed_tokens, num_tokens) for sequence, num_tokens in step.work)
    grown = work.decodes * (num_steps - 1) // 2  # tokens of KV, by the middle one
    return msgspec.structs.replace(work, kv_tokens=work.kv_tokens + grown) if grown else work
