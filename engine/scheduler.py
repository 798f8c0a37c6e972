"""Which sequences compute how many tokens in the next step: in-flight batching with chunked prefill.

Owned by the engine; pure: no clock, no randomness. Everything goes by (priority, turn, arrival), lower first: tenants
whose prompts wait take turns (engine/turns.py). Each step gives every decoding sequence its token, then spends the rest
of the budget on prompts in order, those that run and those that wait: a prompt that does not fit yet is never bypassed,
but one whose beginning a running sequence computes right now lets others go first and finds it cached afterwards.
Admission takes all blocks the known tokens need, so only decoding can run short; then the last running sequence gives
its blocks up and waits again in its old place. The first one is never preempted and fits alone, so it finishes, and
then the next is first: nobody starves.

A step may be planned while another is in flight, whose sampled tokens are pending: counted, but not known. Blocks
that a step in flight uses are not taken away, so nothing is preempted then: the plan says that it must wait.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

import msgspec

from engine.kv.block_hash import sampled
from engine.kv.cache import KvCache
from engine.kv.layout import BlockId
from engine.request import Request
from engine.step_model import StepWork, num_pairs
from engine.turns import Turns

by_key = attrgetter("key")

# What is computed for another sequence anyway is worth waiting for from so many tokens on: for fewer, a step of its own
# costs more than computing them again.
_MIN_SHARED_TOKENS = 256
_MAX_LOOKED_AT = 64  # of the waiting sequences ahead of a new one, the last, that it is compared with


class Schedulable(Protocol):
    """What the scheduler needs of a sequence; engine.sequence says what each means. A simulation has its own."""

    block_ids: list[BlockId]
    num_computed_tokens: int
    num_likely_tokens: int
    num_preemptions: int
    running: bool

    @property
    def request(self) -> Request: ...
    @property
    def key(self) -> tuple[int, int, int]: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def hashes(self) -> list[int]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_pending(self) -> int: ...
    @property
    def max_planned_tokens(self) -> int: ...
    @property
    def must_know_tokens(self) -> bool: ...
    @property
    def wants_prompt_logprobs(self) -> bool: ...
    def forget_computed(self) -> list[BlockId]: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_batch_tokens: int = 512  # tokens one step may compute, prefill and decode together
    max_num_seqs: int = 64  # sequences in one step

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_batch_tokens:
            raise ValueError(f"max_num_seqs must be between 1 and max_batch_tokens: {self}")


@dataclass(frozen=True, slots=True)
class Plan(Generic[S]):
    """One step. `work`: how many of its next tokens each sequence computes."""

    work: list[tuple[S, int]] = field(default_factory=list)
    started: list[S] = field(default_factory=list)  # admitted in this step, all in `work`
    preempted: list[S] = field(default_factory=list)
    must_wait: bool = False  # for the steps in flight, then plan again; there is no work


class EngineLoad(msgspec.Struct, frozen=True, gc=False):
    num_running: int  # in its steps
    num_waiting: int  # those that have their KV and wait for a place in the steps among them
    num_free_blocks: int  # free or evictable
    num_waiting_tokens: int  # not yet computed, of prompts and of preempted sequences
    queued: StepWork  # what computing those takes, without what is likely to be cached by then
    num_queued_steps: int  # that this fills


class Scheduler(Generic[S]):
    """`running` may be longer than `max_num_seqs` where sequences joined with their KV; the first ones go first."""

    def __init__(self, config: SchedulerConfig, kv: KvCache) -> None:
        self._config = config
        self._kv = kv
        self.turns = Turns()
        self.running: list[S] = []
        self.waiting: list[S] = []
        self.num_waiting_tokens = 0
        self.num_uncached_tokens = 0  # of those, without what is likely to be cached by their turn
        self.num_uncached_pairs = 0  # of a token of those and a key it attends to
        self.short_of_blocks = False  # in the last step something could not run, or not go on, for lack of blocks

    def add(self, sequence: S) -> None:
        """Queue a sequence in its place."""
        place = bisect_left(self.waiting, sequence.key, key=by_key)
        self._begin_to_wait(sequence, place)
        self.waiting.insert(place, sequence)
        self._kv.expect(sampled(self._reusable(sequence), self._kv.block_size, sequence.num_likely_tokens))

    def join(self, sequence: S) -> None:
        """Run a sequence that brings its blocks."""
        insort(self.running, sequence, key=by_key)
        sequence.running = True

    def remove(self, sequence: S) -> None:
        """It leaves, wherever it is; its blocks are the caller's."""
        self._take_out(sequence)
        if len(sequence.token_ids) == len(sequence.request.token_ids):  # what it was to compute, others have to now
            self._count_again(sequence.hashes)

    def _take_out(self, sequence: S) -> None:
        queue = self.running if sequence.running else self.waiting
        place = bisect_left(queue, sequence.key, key=by_key)
        assert queue[place] is sequence, sequence.request.id
        del queue[place]
        if sequence.running:
            sequence.running = False
        else:
            self._count(sequence, -1)

    def load(self) -> EngineLoad:
        prefilling = [each for each in self.running if each.num_tokens - each.num_computed_tokens > 1]
        lacking = [(each.num_tokens - each.num_computed_tokens, each.num_computed_tokens) for each in prefilling]
        num_tokens = sum(num_tokens for num_tokens, _ in lacking)
        num_queued = self.num_uncached_tokens + num_tokens
        num_running = min(len(self.running), self._config.max_num_seqs)
        return EngineLoad(
            num_running=num_running,
            num_waiting=len(self.waiting) + len(self.running) - num_running,
            num_free_blocks=self._kv.num_free,
            num_waiting_tokens=self.num_waiting_tokens + num_tokens,
            queued=StepWork(num_queued, self.num_uncached_pairs + sum(itertools.starmap(num_pairs, lacking))),
            num_queued_steps=-(-num_queued // self._config.max_batch_tokens),
        )

    def plan(self, *, in_flight: bool = False) -> Plan[S]:
        """Plan the next step; `in_flight`: others have not ended yet."""
        plan: Plan[S] = Plan()
        was_short, self.short_of_blocks = self.short_of_blocks, False
        prefills = self._decode(plan, in_flight)
        if prefills is None:
            self.short_of_blocks |= was_short
            return Plan(must_wait=True)
        budget = self._config.max_batch_tokens - len(plan.work)
        for sequence in prefills:
            budget = self._admit(plan, budget, sequence.key)
            budget -= self._compute(sequence, budget, plan)
        self._admit(plan, budget)
        return plan

    def _decode(self, plan: Plan[S], in_flight: bool) -> list[S] | None:
        """Plan a token for each sequence that lacks only the last one's KV; returns the others, None: must wait."""
        prefills: list[S] = []
        block_size = self._kv.block_size
        place = 0
        while place < min(len(self.running), self._config.max_num_seqs):
            sequence = self.running[place]
            place += 1
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            if num_tokens - sequence.num_computed_tokens > 1:
                prefills.append(sequence)
            elif sequence.num_pending and num_tokens >= sequence.max_planned_tokens:
                pass  # it ends with a pending token
            elif sequence.must_know_tokens:
                return None
            elif len(sequence.block_ids) * block_size >= num_tokens or self._grow(sequence, plan, in_flight):
                plan.work.append((sequence, 1))
            elif in_flight:
                return None
        return prefills

    def _grow(self, sequence: S, plan: Plan[S], in_flight: bool) -> bool:
        """One more block, from those behind if need be; with nobody behind, it keeps what it has and waits."""
        while (block_ids := self._kv.allocate(1)) is None:
            self.short_of_blocks = True
            last = self.running[-1]
            if last is sequence or in_flight:
                return False
            self._preempt(last)
            plan.preempted.append(last)
        sequence.block_ids += block_ids
        return True

    def _preempt(self, sequence: S) -> None:
        """Its full blocks are in the prefix cache; what is not evicted meanwhile it finds there again."""
        self._take_out(sequence)
        self._kv.release(sequence.forget_computed())
        sequence.num_preemptions += 1
        self.add(sequence)

    def _admit(self, plan: Plan[S], budget: int, before: tuple[int, int, int] | None = None) -> int:
        """Those that wait, all or those `before` a key. Returns what is left of the budget."""
        passed_over, awaited = 0, dict[int, set[int]]()
        while budget > 0 and passed_over < len(self.waiting) and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[passed_over]
            if self.short_of_blocks or (before is not None and sequence.key > before):
                break
            if self._waits_for_others(sequence, awaited):
                passed_over += 1
                continue
            if not self._reserve(sequence):
                self.short_of_blocks = True
                break
            self._take_out(sequence)
            self.join(sequence)
            if not passed_over:  # else it would be their turn that is over
                self.turns.reached(*sequence.key[:2])
            plan.started.append(sequence)
            budget -= self._compute(sequence, budget, plan)
        return budget

    def _waits_for_others(self, sequence: S, awaited: dict[int, set[int]]) -> bool:
        """Whether enough of what it lacks is being computed by running ones ahead of it. `awaited`: hashes of
        blocks of which that is known, by their places."""
        if sequence.wants_prompt_logprobs:
            return False
        num_blocks = (sequence.num_tokens - 1) // self._kv.block_size
        if any(place < num_blocks and sequence.hashes[place] in hashes for place, hashes in awaited.items()):
            return True
        place = self._kv.num_likely(self._reusable(sequence)) + self._min_shared - 1
        if place >= num_blocks:
            return False
        block_hash = sequence.hashes[place]
        ahead = itertools.islice(self.running, bisect_left(self.running, sequence.key, key=by_key))
        if not any(self._computes(other, place, block_hash) for other in ahead):
            return False
        awaited.setdefault(place, set()).add(block_hash)
        return True

    def _computes(self, other: S, place: int, block_hash: int) -> bool:
        """Whether it has this block and not got its first token since, with which the block is cached."""
        num_tokens = len(other.token_ids)
        if place >= min(len(other.hashes), num_tokens // self._kv.block_size) or other.hashes[place] != block_hash:
            return False
        return num_tokens == len(other.request.token_ids)

    def _reserve(self, sequence: S) -> bool:
        """Blocks for all tokens, or none: those of the longest cached prefix, and fresh ones.

        The last token is always computed, as its logits are wanted; for logprobs of the prompt, all are.
        """
        kv, num_tokens = self._kv, sequence.num_tokens
        num_blocks = -(-num_tokens // kv.block_size)
        hashes = self._reusable(sequence)
        if num_blocks - kv.num_likely(hashes) > kv.num_free:
            return False  # seen without comparing a long prompt again in every step it waits
        held = kv.match(sequence.token_ids, hashes)
        fresh = kv.allocate(num_blocks - len(held))
        if fresh is None:
            kv.release(held)
            return False
        sequence.block_ids = held + fresh
        sequence.num_computed_tokens = len(held) * kv.block_size
        return True

    def _reusable(self, sequence: S) -> list[int]:
        """Hashes of the blocks that need not be computed where they are cached."""
        if sequence.wants_prompt_logprobs:
            return []
        return sequence.hashes[: (sequence.num_tokens - 1) // self._kv.block_size]

    def _begin_to_wait(self, sequence: S, place: int) -> None:
        """Behind so many others."""
        sequence.num_likely_tokens = self._num_likely(sequence, place) * self._kv.block_size
        self._count(sequence, 1)

    def _count(self, sequence: S, sign: int) -> None:
        """A sequence begins or ends to wait."""
        past = sequence.num_likely_tokens
        lacking = sequence.num_tokens - past
        self.num_waiting_tokens += sign * sequence.num_tokens
        self.num_uncached_tokens += sign * lacking
        self.num_uncached_pairs += sign * num_pairs(lacking, past)

    def _num_likely(self, sequence: S, place: int) -> int:
        """Of its blocks, how many are cached or will be by its turn, as running ones or those ahead compute them."""
        hashes = self._reusable(sequence)
        cached = shared = self._kv.num_likely(hashes)
        for other in itertools.chain(self.running, self.waiting[max(0, place - _MAX_LOOKED_AT) : place]):
            if shared < len(hashes) and self._computes(other, shared, hashes[shared]):
                theirs, end = other.hashes, min(len(hashes), len(other.token_ids) // self._kv.block_size)
                shared = bisect_left(range(end), True, lo=shared, key=lambda place: theirs[place] != hashes[place])
        return shared if shared - cached >= self._min_shared else cached

    def _count_again(self, hashes: Sequence[int]) -> None:
        """For those who counted on these blocks, which leave: who has some of them that nobody ahead of him has."""
        covered, size = 0, self._kv.block_size
        for place, sequence in enumerate(self.waiting):
            theirs, last = sequence.hashes, sequence.num_likely_tokens // size - 1
            if covered <= last < len(hashes) and theirs[last] == hashes[last]:
                self._count(sequence, -1)
                self._begin_to_wait(sequence, place)
                end = min(len(hashes), len(theirs), len(sequence.token_ids) // size)
                covered = bisect_left(range(end), True, lo=last, key=lambda at: theirs[at] != hashes[at])
                if covered == len(hashes):
                    return

    @property
    def _min_shared(self) -> int:
        """_MIN_SHARED_TOKENS in blocks."""
        return -(-_MIN_SHARED_TOKENS // self._kv.block_size)

    def _compute(self, sequence: S, budget: int, plan: Plan[S]) -> int:
        """Plan the next tokens, at most `budget`. A chunk in mid-prompt ends with a block where it can."""
        start = sequence.num_computed_tokens
        num_tokens = sequence.num_tokens - start
        if num_tokens > budget:
            aligned = (start + budget) // self._kv.block_size * self._kv.block_size
            num_tokens = aligned - start if aligned > start else budget
        if num_tokens > 0:
            plan.work.append((sequence, num_tokens))
        return num_tokens
