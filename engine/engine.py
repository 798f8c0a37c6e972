"""The synchronous engine that both roles and the colocated library compose: requests in, tokens out.

Owns the sequences, the scheduler and the KV cache of one worker, and drives its executor. All calls come from one
thread; the loop is `schedule`, `start`, `collect`, and with an executor that allows it a step is started before the
one before it is collected. A request is known from `submit` or `resume` until its last token, `cancel` or `detach`;
its blocks are given back in each of these, except that `detach` passes them on.

Invariant: a block that a step in flight may read or write is not free before that step is collected. So whatever
sequences give back while steps are in flight goes back with the last of them. An end token is found one step late:
the step in flight computes a token too many for that sequence, which nobody sees.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidRequest
from engine.executors.base import Batch, Chunk, Executor, PendingStep, Sampled, TokenLogprobs
from engine.kv.block_hash import block_hashes, chain_seed
from engine.kv.cache import KvCache
from engine.kv.layout import BlockId
from engine.request import SEED_MASK, FinishReason, Request, RequestId
from engine.scheduler import EngineLoad, Plan, Scheduler, SchedulerConfig
from engine.sequence import Sequence as Running
from engine.step_model import num_pairs

PENDING = (0,)  # stands for a token that only the device knows


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token. `index` output tokens came before it, earlier attempts included."""

    request_id: RequestId
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None  # of prompt tokens 1.., with the token of index 0
    finish_reason: FinishReason | None = None  # set: the request has left the engine


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A step to run. `sequences` is aligned with `batch.chunks`.

    `started`: sequences whose first chunk this is, with `num_computed_tokens` found in the prefix cache; those that
    come back after a preemption too, told apart by `num_preemptions`.
    """

    batch: Batch
    sequences: Sequence[Running]
    started: Sequence[Running]
    preempted: Sequence[RequestId]


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: PendingStep
    chunks: Sequence[Chunk]
    sequences: Sequence[Running]
    released: list[BlockId] = field(default_factory=list)  # to be given back when the step has ended


class Engine:
    """`secret` and `model` start the hash chains. Does not close `executor`."""

    def __init__(self, executor: Executor, config: SchedulerConfig, *, secret: str, model: str) -> None:
        self.executor = executor
        self.kv = KvCache(executor.memory.num_blocks, executor.layout.block_size)
        self.max_len = min(executor.max_model_len, self.kv.num_blocks * self.kv.block_size)
        self._scheduler: Scheduler[Running] = Scheduler(config, self.kv)
        self._sequences: dict[RequestId, Running] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._arrivals = itertools.count()
        self._secret = secret
        self._model = model

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps started and not collected."""
        return len(self._in_flight)

    @property
    def can_start(self) -> bool:
        """There is room for one more step in flight."""
        return len(self._in_flight) < self.executor.max_in_flight

    @property
    def short_of_blocks(self) -> bool:
        """The last `schedule` left a sequence without blocks; who else allocates should let it go first."""
        return self._scheduler.short_of_blocks

    def check(self, request: Request) -> None:
        """Raise InvalidRequest when the request can never run here."""
        token_ids, num_prompt = request.token_ids, request.num_prompt_tokens
        vocab = self.executor.vocab_size
        if not token_ids or not 1 <= num_prompt <= len(token_ids):
            raise InvalidRequest("the prompt must have at least one token", param="prompt")
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            raise InvalidRequest(f"the prompt holds a token id outside 0..{vocab - 1}", param="prompt")
        if len(token_ids) >= self.max_len:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens; with room for one more, at most {self.max_len - 1} fit",
                param="prompt",
                code="context_length_exceeded",
            )
        request.params.check(vocab)
        if not 0 <= request.seed <= SEED_MASK:
            raise InvalidRequest(f"seed must be between 0 and {SEED_MASK}, not {request.seed}", param="seed")
        if len(token_ids) - num_prompt >= request.params.max_tokens:
            raise InvalidRequest("max_tokens has been reached already", param="max_tokens")

    def hashes(self, request: Request) -> list[int]:
        """Of the full blocks of its tokens."""
        return block_hashes(request.token_ids, self.kv.block_size, self._hash_seed(request))

    def submit(self, request: Request, *, decodes: bool = True) -> None:
        """Queue a request; with `decodes` False the caller detaches it at its first token. Raises InvalidRequest."""
        self.check(request)
        self._scheduler.add(self._enter(request, decodes=decodes))

    def resume(self, request: Request, block_ids: list[BlockId]) -> None:
        """Go on with a request whose KV is in `block_ids`, except that of its last token.

        The caller's references to the blocks become the engine's.
        """
        num_computed = len(request.token_ids) - 1
        assert len(block_ids) == -(-num_computed // self.kv.block_size), (num_computed, block_ids)
        sequence = self._enter(request, decodes=True, resumed=True)
        sequence.block_ids = list(block_ids)
        sequence.num_computed_tokens = num_computed
        self._store(sequence, num_computed)
        self._scheduler.join(sequence)

    def cancel(self, request_id: RequestId) -> bool:
        """Forget a request in any state. False when it is not known (any more)."""
        if request_id not in self._sequences:
            return False
        self._release(self._leave(request_id))
        return True

    def detach(self, request_id: RequestId) -> list[BlockId]:
        """Forget a request; the references to its blocks become the caller's. Full ones are in the prefix cache.

        Not while a step in flight computes for it.
        """
        return self._leave(request_id)

    def schedule(self) -> Scheduled | None:
        """Plan the next step; None when nothing can run now, or not before a step in flight is collected."""
        plan = self._scheduler.plan(in_flight=bool(self._in_flight))
        if not plan.work:
            return None
        return _scheduled(plan)

    def start(self, scheduled: Scheduled, on_group_done: Callable[[int], None] | None = None) -> None:
        """Start a step just scheduled. Requests cancelled since then are left out. Asks for `can_start`."""
        assert self.can_start, len(self._in_flight)
        chunks, sequences = scheduled.batch.chunks, scheduled.sequences
        batch = scheduled.batch
        if not all(sequence.running for sequence in sequences):
            sequences = [sequence for sequence in sequences if sequence.running]
            chunks = [chunk for chunk, each in zip(chunks, scheduled.sequences, strict=True) if each.running]
            batch = Batch(chunks)
        if not sequences:
            return
        step = self.executor.submit(batch, on_group_done)
        self._in_flight.append(_InFlight(step, chunks, sequences))
        for row, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            sequence.num_computed_tokens = chunk.end
            if chunk.sample is not None:
                sequence.num_pending += 1
                sequence.pending_row = row

    def collect(self) -> list[TokenOutput]:
        """Wait for the oldest step in flight and take its tokens. Nothing when there is none."""
        if not self._in_flight:
            return []
        oldest = self._in_flight[0]
        result = oldest.step.result()
        outputs: list[TokenOutput] = []
        for sequence, chunk, sampled, logprobs in zip(
            oldest.sequences, oldest.chunks, result.sampled, result.prompt_logprobs, strict=True
        ):
            if not sequence.running:  # it has left since
                continue
            self._advance(sequence, chunk)
            if logprobs is not None:
                sequence.prompt_logprobs.extend(logprobs)
            if sampled is not None:
                outputs.append(self._take(sequence, sampled))
        self._in_flight.popleft()
        self.kv.release(oldest.released)
        return outputs

    def run(self, scheduled: Scheduled, on_group_done: Callable[[int], None] | None = None) -> list[TokenOutput]:
        """`start` and `collect` of a step just scheduled, with none in flight."""
        assert not self._in_flight, len(self._in_flight)
        self.start(scheduled, on_group_done)
        return self.collect()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def check_invariants(self, others: Iterable[BlockId] = ()) -> None:
        """Assert that every reference to a block is a sequence's, or one of `others` (leases, pulls)."""
        scheduler = self._scheduler
        for queue, running in ((scheduler.running, True), (scheduler.waiting, False)):
            assert [sequence.key for sequence in queue] == sorted(sequence.key for sequence in queue)
            assert all(sequence.running == running for sequence in queue)
            assert all(self._sequences[sequence.request.id] is sequence for sequence in queue)
        assert len(scheduler.running) + len(scheduler.waiting) == len(self._sequences)
        assert scheduler.num_waiting_tokens == sum(sequence.num_tokens for sequence in scheduler.waiting)
        lacking = [(each.num_tokens - each.num_likely_tokens, each.num_likely_tokens) for each in scheduler.waiting]
        assert scheduler.num_uncached_tokens == sum(num_tokens for num_tokens, _ in lacking)
        assert scheduler.num_uncached_pairs == sum(itertools.starmap(num_pairs, lacking))
        held = (block for sequence in self._sequences.values() for block in sequence.block_ids)
        late = (block for step in self._in_flight for block in step.released)
        self.kv.check_invariants(itertools.chain(held, late, others))

    def _enter(self, request: Request, *, decodes: bool, resumed: bool = False) -> Running:
        assert request.id not in self._sequences, request.id
        sequence = self._sequences[request.id] = Running(
            request,
            self._scheduler.turns.take(request.priority, request.tenant, 0 if resumed else len(request.token_ids)),
            next(self._arrivals),
            hash_seed=self._hash_seed(request),
            hashes=self.hashes(request),
            eos_token_ids=self.executor.eos_token_ids,
            max_len=self.max_len,
            decodes=decodes,
        )
        return sequence

    def _leave(self, request_id: RequestId) -> list[BlockId]:
        sequence = self._sequences.pop(request_id)
        self._scheduler.remove(sequence)
        return sequence.block_ids

    def _advance(self, sequence: Running, chunk: Chunk) -> None:
        """The KV of `chunk` is computed."""
        block_size = self.kv.block_size
        if chunk.end // block_size > chunk.start // block_size:
            self._store(sequence, chunk.end)

    def _take(self, sequence: Running, sampled: Sampled) -> TokenOutput:
        request_id = sequence.request.id
        index = sequence.num_output_tokens
        wanted = index == 0 and sequence.request.params.prompt_logprobs is not None
        prompt_logprobs = sequence.prompt_logprobs if wanted else None
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            self._release(self._leave(request_id))
        return TokenOutput(request_id, index, sampled.token_id, sampled.logprobs, prompt_logprobs, reason)

    def _store(self, sequence: Running, num_tokens: int) -> None:
        sequence.extend_hashes(self.kv.block_size, num_tokens)
        self._release(self.kv.store(sequence.token_ids, sequence.hashes, sequence.block_ids, num_tokens))

    def _release(self, block_ids: list[BlockId]) -> None:
        """Of sequences: steps in flight may still use the blocks."""
        if self._in_flight:
            self._in_flight[-1].released.extend(block_ids)
        else:
            self.kv.release(block_ids)

    def _hash_seed(self, request: Request) -> int:
        return chain_seed(self._secret, self._model, request.adapter, request.cache_salt)


def _scheduled(plan: Plan[Running]) -> Scheduled:
    return Scheduled(
        Batch([_chunk(sequence, num_tokens) for sequence, num_tokens in plan.work]),
        [sequence for sequence, _ in plan.work],
        plan.started,
        [sequence.request.id for sequence in plan.preempted],
    )


def _chunk(sequence: Running, num_tokens: int) -> Chunk:
    """The block ids and the sample spec are the sequence's own, valid until the step is submitted."""
    start = sequence.num_computed_tokens
    end = start + num_tokens
    spec = sequence.sample_spec if end == sequence.num_tokens else None
    if end > len(sequence.token_ids):  # the token is still being computed
        return Chunk(sequence.request.id, PENDING, start, sequence.block_ids, spec, follows=sequence.pending_row)
    token_ids = sequence.token_ids[start:end]
    if not sequence.wants_prompt_logprobs:
        return Chunk(sequence.request.id, token_ids, start, sequence.block_ids, spec)
    return Chunk(
        sequence.request.id,
        token_ids,
        start,
        sequence.block_ids,
        spec,
        sequence.request.params.prompt_logprobs,
        sequence.token_ids[start + 1 : end + 1],
    )
