"""Scheduling decisions, one at a time: who computes what, who is admitted, who gives way."""

from typing import Any

import pytest

from engine.kv.block_hash import block_hashes
from engine.kv.cache import KvCache
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import Plan, Scheduler, SchedulerConfig
from engine.sequence import Sequence

SIZE = 4


class Bench:
    """A scheduler whose steps 'compute' at once."""

    def __init__(self, num_blocks: int = 100, **config: int) -> None:
        self.kv = KvCache(num_blocks, SIZE)
        self.scheduler = Scheduler(SchedulerConfig(**config), self.kv)
        self.num_added = 0

    def add(
        self, name: str, num_tokens: int, *, priority: int = 0, tenant: str = "", first: int = 0, **params: Any
    ) -> Sequence:
        """Prompts of different `first` share nothing."""
        token_ids = tuple(range(first * 10_000, first * 10_000 + num_tokens))
        request = Request(RequestId(name), token_ids, num_tokens, SamplingParams(max_tokens=500, **params), 0, priority)
        hashes = block_hashes(token_ids, SIZE, 0)
        turn = self.scheduler.turns.take(priority, tenant, num_tokens)
        sequence = Sequence(request, turn, self.num_added, hash_seed=0, hashes=hashes, eos_token_ids=(), max_len=10_000)
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[str, int]:
        """Tokens computed for each sequence."""
        plan = self.scheduler.plan()
        self.compute(plan)
        return {sequence.request.id: num_tokens for sequence, num_tokens in plan.work}

    def compute(self, plan: Plan) -> None:
        for sequence, num_tokens in plan.work:
            sequence.num_computed_tokens += num_tokens
            done = sequence.num_computed_tokens
            sequence.extend_hashes(SIZE, done)
            self.kv.release(self.kv.store(sequence.token_ids, sequence.hashes, sequence.block_ids, done))
            if sequence.num_computed_tokens == sequence.num_tokens:
                sequence.num_pending += 1
                sequence.append(7)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.kv.release(sequence.block_ids)

    def running(self) -> list[str]:
        return [sequence.request.id for sequence in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [sequence.request.id for sequence in self.scheduler.waiting]


def test_a_prompt_is_computed_in_chunks_that_end_with_a_block() -> None:
    bench = Bench(max_batch_tokens=10, max_num_seqs=4)
    bench.add("a", 21)
    assert [bench.step() for _ in range(4)] == [{"a": 8}, {"a": 8}, {"a": 5}, {"a": 1}]


def test_a_budget_below_a_block_still_makes_progress() -> None:
    bench = Bench(max_batch_tokens=3, max_num_seqs=2)
    bench.add("a", 9)
    assert [bench.step()["a"] for _ in range(5)] == [3, 1, 3, 2, 1]


def test_decoding_goes_first_and_prompts_share_the_rest_in_order() -> None:
    bench = Bench(max_batch_tokens=16, max_num_seqs=4)
    bench.add("a", 3)
    bench.step()
    bench.add("b", 20, first=1)
    bench.add("c", 8, first=2)
    assert bench.step() == {"a": 1, "b": 12, "c": 3}
    assert list(bench.step()) == ["a", "b", "c"]


def test_at_most_max_num_seqs_run() -> None:
    bench = Bench(max_batch_tokens=16, max_num_seqs=2)
    first = bench.add("a", 2)
    for i, name in enumerate("bc"):
        bench.add(name, 2, first=i + 1)
    assert list(bench.step()) == ["a", "b"]
    bench.finish(first)
    assert bench.step() == {"b": 1, "c": 2}


def test_lower_priority_numbers_are_admitted_first_and_arrival_decides_within_one() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=1)
    for i, (name, priority) in enumerate([("a", 1), ("b", 0), ("c", 1), ("d", -5), ("e", 0)]):
        bench.add(name, 2, priority=priority, first=i)
    order = []
    while bench.waiting():
        bench.step()
        order += bench.running()
        bench.finish(bench.scheduler.running[0])
    assert order == ["d", "b", "e", "a", "c"]


def test_a_long_prompt_is_not_bypassed_by_short_ones_behind_it() -> None:
    bench = Bench(num_blocks=6, max_batch_tokens=100, max_num_seqs=8)
    first = bench.add("first", 8)
    bench.step()
    bench.add("long", 20, first=1)
    bench.add("short", 1, first=2)
    assert bench.step() == {"first": 1}
    assert bench.scheduler.short_of_blocks
    bench.finish(first)
    assert bench.step() == {"long": 20, "short": 1}
    assert not bench.scheduler.short_of_blocks


def test_a_cached_prefix_is_not_computed_again_except_for_the_last_token() -> None:
    bench = Bench(max_batch_tokens=100, max_num_seqs=4)
    first = bench.add("a", 16)
    bench.step()
    bench.finish(first)
    again = bench.add("b", 16)
    longer = bench.add("c", 30)
    assert bench.step() == {"b": 4, "c": 14}
    assert again.block_ids == longer.block_ids[:4]
    bench.kv.check_invariants(again.block_ids + longer.block_ids)


def test_logprobs_of_the_prompt_need_all_of_it_computed() -> None:
    bench = Bench(max_batch_tokens=100, max_num_seqs=4)
    bench.finish(_ran(bench, bench.add("a", 16)))
    bench.add("b", 16, prompt_logprobs=1)
    assert bench.step() == {"b": 16}


def test_an_urgent_prompt_goes_before_the_rest_of_one_that_runs() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=3)
    bench.add("long", 40)
    assert bench.step() == {"long": 8}
    bench.add("urgent", 14, priority=-1, first=1)
    assert [bench.step() for _ in range(3)] == [{"urgent": 8}, {"urgent": 6, "long": 2}, {"urgent": 1, "long": 6}]
    bench.add("other tenant", 8, tenant="b", first=2)  # its turn comes after what has begun
    assert list(bench.step().items()) == [("urgent", 1), ("long", 4), ("other tenant", 3)]


def test_a_prompt_goes_before_the_rest_of_each_less_urgent_one_and_of_no_other() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=4)
    bench.add("low", 40, priority=5)
    assert bench.step() == {"low": 8}
    bench.add("high", 12, first=1)
    assert bench.step() == {"high": 8}
    bench.add("middle", 4, priority=3, first=2)
    assert list(bench.step().items()) == [("high", 4), ("middle", 4)]


def test_urgent_prompts_take_turns_also_where_they_go_before_one_that_runs() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=4)
    bench.add("low", 40)
    bench.step()
    for number in range(2):
        bench.add(f"a{number}", 8, tenant="a", priority=-1, first=number + 1)
        bench.step()
    assert bench.running()[:2] == ["a0", "a1"]
    assert bench.scheduler.turns.take(-1, "b", 8) == 8


def test_who_comes_in_the_step_of_a_preemption_waits_for_the_next() -> None:
    bench = Bench(num_blocks=5, max_batch_tokens=16, max_num_seqs=4)
    bench.add("a", 8)
    bench.add("b", 8, priority=5, first=1)
    bench.step()
    bench.add("small", 3, priority=1, first=2)
    bench.kv.allocate(1)  # by a pull
    assert bench.step() == {"a": 1}
    assert bench.waiting() == ["small", "b"]
    assert "small" in bench.step()


def test_an_urgent_prompt_of_a_tenant_with_many_waiting_costs_other_tenants_no_turn() -> None:
    bench = Bench(num_blocks=999, max_batch_tokens=8, max_num_seqs=4)
    for number in range(10):
        bench.add(f"a{number}", 8, tenant="a", first=number)
    bench.add("urgent", 8, tenant="a", priority=-1, first=10)
    assert bench.step() == {"urgent": 8}
    bench.add("b", 8, tenant="b", first=11)
    started = [name for _ in range(4) for name in bench.step() if name != "urgent"]
    assert "b" in started[:3], started


def test_an_urgent_prompt_without_room_holds_up_nothing_that_runs_and_lets_nobody_pass() -> None:
    bench = Bench(num_blocks=10, max_batch_tokens=8, max_num_seqs=8)
    bench.add("long", 32)
    bench.step()
    bench.add("urgent", 12, priority=-2, first=1)  # 3 blocks, and 2 are free
    bench.add("small", 4, priority=-1, first=2)
    assert bench.step() == {"long": 8}
    assert bench.scheduler.short_of_blocks
    assert bench.waiting() == ["urgent", "small"]


def test_shortage_preempts_the_youngest_of_the_lowest_priority_and_it_returns_to_its_place() -> None:
    bench = Bench(num_blocks=3, max_batch_tokens=100, max_num_seqs=4)
    bench.add("old", 3)
    bench.add("young", 3, first=1)
    bench.add("low", 3, priority=9, first=2)
    bench.step()
    bench.add("late", 3, first=3)
    assert bench.step() == {"old": 1, "young": 1, "low": 1}
    plan = bench.scheduler.plan()
    assert [sequence.request.id for sequence in plan.preempted] == ["low"]
    assert bench.running() == ["old", "young"]
    assert bench.waiting() == ["late", "low"]
    assert [sequence.request.id for sequence, _ in plan.work] == ["old"]
    assert [sequence.num_preemptions for sequence in bench.scheduler.waiting] == [0, 1]
    bench.compute(plan)
    held = [block for sequence in bench.scheduler.running for block in sequence.block_ids]
    bench.kv.check_invariants(held)


def test_a_preempted_sequence_finds_its_blocks_again_in_the_prefix_cache() -> None:
    bench = Bench(num_blocks=8, max_batch_tokens=100, max_num_seqs=4)
    old = bench.add("old", 16)
    young = bench.add("young", 14, first=1)
    bench.step()
    assert bench.step() == {"old": 1}
    assert bench.waiting() == ["young"]
    bench.finish(old)
    assert bench.step() == {"young": 3}
    assert young.num_preemptions == 1


def test_the_last_one_running_short_keeps_its_blocks_and_waits() -> None:
    bench = Bench(num_blocks=3, max_batch_tokens=100, max_num_seqs=4)
    outside = bench.kv.allocate(2)
    assert outside is not None
    bench.add("a", 4)
    assert bench.step() == {"a": 4}
    assert bench.step() == {}
    assert bench.running() == ["a"]
    assert bench.scheduler.short_of_blocks
    bench.kv.release(outside[:1])
    assert bench.step() == {"a": 1}


def test_sequences_that_join_with_their_kv_take_turns_by_age_beyond_max_num_seqs() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=2)
    joined = []
    for i, name in enumerate("abc"):
        sequence = bench.add(name, 3, first=i)
        bench.scheduler.remove(sequence)
        blocks = bench.kv.allocate(1)
        assert blocks is not None
        sequence.block_ids = blocks
        sequence.num_computed_tokens = 2
        bench.scheduler.join(sequence)
        joined.append(sequence)
    bench.add("d", 3, first=4)
    assert bench.step() == {"a": 1, "b": 1}
    load = bench.scheduler.load()
    assert (load.num_running, load.num_waiting) == (2, 2)
    bench.finish(joined[0])
    assert bench.step() == {"b": 1, "c": 1}
    bench.finish(joined[1])
    assert bench.step() == {"c": 1, "d": 3}


def test_a_sequence_can_leave_from_either_queue() -> None:
    bench = Bench(max_batch_tokens=8, max_num_seqs=1)
    first, second = bench.add("a", 3), bench.add("b", 5, first=1)
    bench.step()
    assert bench.scheduler.num_waiting_tokens == 5
    bench.scheduler.remove(second)
    assert (bench.waiting(), bench.scheduler.num_waiting_tokens) == ([], 0)
    bench.finish(first)
    assert bench.running() == []
    bench.kv.check_invariants([])


def test_more_sequences_than_tokens_in_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        SchedulerConfig(max_batch_tokens=8, max_num_seqs=9)
    with pytest.raises(ValueError, match="max_num_seqs"):
        SchedulerConfig(max_num_seqs=0)


def _ran(bench: Bench, sequence: Sequence) -> Sequence:
    bench.step()
    return sequence


def test_tenants_whose_prompts_wait_take_turns_and_one_alone_is_served_in_order() -> None:
    bench = Bench(max_batch_tokens=16, max_num_seqs=4)
    for i in range(4):
        bench.add(f"a{i}", 16, tenant="a", first=i)
    order = [*bench.step()]
    bench.add("b0", 16, tenant="b", first=4)
    bench.add("c0", 16, tenant="c", first=5)
    bench.add("b1", 16, tenant="b", first=6)
    while bench.scheduler.waiting:
        (running,) = bench.scheduler.running
        bench.scheduler.remove(running)
        order += bench.step()
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_tenants_turn_does_not_come_before_a_higher_priority() -> None:
    bench = Bench(max_batch_tokens=16, max_num_seqs=4)
    bench.add("a0", 16, tenant="a", priority=1)
    bench.add("a1", 16, tenant="a", first=1)
    bench.add("b0", 16, tenant="b", priority=1, first=2)
    assert [*bench.step()] == ["a1"]
