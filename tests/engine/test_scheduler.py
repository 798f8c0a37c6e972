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
        turn = self.scheduler.turns.take(tenant, num_tokens)
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


def test_what_another_sequence_computes_is_awaited_and_others_go_first() -> None:
    bench = Bench(num_blocks=2000, max_batch_tokens=1000, max_num_seqs=8)
    bench.add("a", 600)
    assert bench.scheduler.num_uncached_tokens == 600
    bench.add("b", 640)
    bench.add("c", 700)
    bench.add("d", 100, first=1)
    assert bench.scheduler.num_uncached_tokens == 600 + 40 + 60 + 100
    assert bench.step() == {"a": 600, "d": 100}
    assert bench.waiting() == ["b", "c"]
    assert bench.step() == {"a": 1, "d": 1, "b": 40, "c": 100}


def test_a_prompt_that_takes_several_steps_is_awaited_to_the_last() -> None:
    bench = Bench(num_blocks=2000, max_batch_tokens=500, max_num_seqs=8)
    bench.add("a", 1400)
    bench.add("b", 1500)
    assert [bench.step() for _ in range(3)] == [{"a": 500}, {"a": 500}, {"a": 400}]
    assert bench.step() == {"a": 1, "b": 100}


@pytest.mark.parametrize(("shared", "together"), [(252, True), (256, False)])
def test_what_is_computed_faster_than_awaited_is_computed_again(shared: int, together: bool) -> None:
    bench = Bench(num_blocks=2000, max_batch_tokens=1000, max_num_seqs=8)
    bench.add("a", shared)
    bench.add("b", shared + 10)
    assert bench.step() == {"a": shared, **({"b": shared + 10} if together else {})}


def test_nobody_waits_for_a_sequence_that_left_or_was_cached_or_computes_all_of_it_anyway() -> None:
    bench = Bench(num_blocks=2000, max_batch_tokens=1000, max_num_seqs=8)
    left = bench.add("a", 600)
    bench.scheduler.plan()
    bench.finish(left)
    bench.add("b", 640)
    assert bench.step() == {"b": 640}
    bench.add("c", 700)
    assert bench.step() == {"b": 1, "c": 60}
    bench.add("e", 640, first=1)
    bench.add("f", 320, first=1, prompt_logprobs=0)
    assert bench.step() == {"b": 1, "c": 1, "e": 640, "f": 320}


def test_any_number_waits_for_the_same_and_those_behind_go_first_in_order() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=4000, max_num_seqs=100)
    for number in range(60):
        bench.add(f"a{number}", 600)
    bench.add("b", 100, first=1)
    bench.add("c", 100, first=2)
    assert list(bench.step().items()) == [("a0", 600), ("b", 100), ("c", 100)]
    assert bench.step() == {"a0": 1, "b": 1, "c": 1, **{f"a{number}": 4 for number in range(1, 60)}}


def test_nobody_overtakes_one_behind_them_that_does_not_fit() -> None:
    bench = Bench(num_blocks=400, max_batch_tokens=4000, max_num_seqs=8)
    bench.add("a", 600)
    bench.add("b", 640)
    bench.add("big", 1200, first=1)
    bench.add("small", 8, first=2)
    assert bench.step() == {"a": 600}
    assert bench.scheduler.short_of_blocks
    assert bench.waiting() == ["b", "big", "small"]


def test_who_waits_for_others_keeps_the_turn_of_his_tenant_and_takes_nobody_elses() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=1000, max_num_seqs=100)
    bench.add("leader", 3000, tenant="x")
    bench.step()
    for number in range(5):
        bench.add(f"x{number}", 3100, tenant="x")
    bench.add("x5", 4, tenant="x", first=1)
    bench.step()
    bench.add("y", 4, tenant="y", first=2)
    assert bench.step() == {"leader": 1000}  # with it the budget is spent
    assert list(bench.step()) == ["leader", "y", "x0", "x1", "x2", "x3", "x4", "x5"]


def test_nobody_waits_for_one_that_comes_after_him() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=1001, max_num_seqs=100)
    bench.add("later", 3000, priority=10)
    assert bench.step() == {"later": 1000}
    bench.add("first", 3000, priority=0)
    assert bench.step() == {"later": 1000, "first": 1}
    assert bench.step() == {"first": 999, "later": 2}


def test_what_is_told_of_the_queue_counts_what_others_compute_until_they_leave() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=1000, max_num_seqs=100)
    leader = bench.add("leader", 3000)
    follower = bench.add("a", 3040)
    bench.add("b", 3080)
    for number in range(3):
        bench.add(f"short {number}", 240, first=1)
    assert bench.scheduler.num_uncached_tokens == 3000 + 40 + 40 + 3 * 240
    bench.scheduler.remove(leader)
    assert bench.scheduler.num_uncached_tokens == 3040 + 40 + 3 * 240
    bench.step()
    assert bench.running() == ["a"]
    assert bench.scheduler.load().queued.prefill_tokens == 2040 + 40 + 3 * 240
    bench.finish(follower)  # a third of it is cached
    assert bench.scheduler.load().queued.prefill_tokens == 2080 + 3 * 240


def test_what_new_prompts_have_computed_is_told_once() -> None:
    bench = Bench(num_blocks=4000, max_batch_tokens=1000, max_num_seqs=8)
    first = bench.add("a", 1100)
    assert bench.kv.drain_coming() == [first.hashes[127], first.hashes[255]]
    second = bench.add("b", 1600)  # the rest of it is told already
    assert bench.kv.drain_coming() == [second.hashes[383]]
    bench.add("c", 511, first=1)
    bench.add("d", 1600, prompt_logprobs=0)
    assert bench.kv.drain_coming() == []


def test_an_answer_that_is_not_there_yet_is_nothing_to_wait_for() -> None:
    """A simulated sequence knows the hashes of its whole answer."""
    bench = Bench(num_blocks=2000, max_batch_tokens=2000, max_num_seqs=8)
    first = bench.add("a", 600)
    first.hashes += block_hashes(range(1200), SIZE, 0)[150:]
    bench.add("b", 1200)
    assert bench.scheduler.num_uncached_tokens == 600 + 600
    assert bench.step() == {"a": 600}
    assert bench.step() == {"a": 1, "b": 600}


def test_overtaking_ends_nobodys_turn() -> None:
    bench = Bench(num_blocks=4000, max_batch_tokens=3000, max_num_seqs=8)
    bench.add("leader", 2000, tenant="x")
    bench.add("follower", 2004, tenant="x")
    bench.add("other", 800, tenant="x", first=1)
    assert bench.step() == {"leader": 2000, "other": 800}
    assert bench.scheduler.turns.take("y", 10) == 0


def test_each_who_counted_on_one_that_left_has_to_compute_what_nobody_ahead_of_him_does() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=100, max_num_seqs=8)
    leader = bench.add("leader", 4000)
    bench.add("short", 1000)
    bench.add("long", 4012)
    bench.add("longer", 4400)
    assert bench.scheduler.num_uncached_tokens == 4000 + 4 + 12 + 388
    bench.scheduler.remove(leader)
    assert bench.scheduler.num_uncached_tokens == 1000 + 3012 + 388


def test_who_is_ahead_counts_on_nobody_behind() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=100, max_num_seqs=8)
    bench.add("later", 1500)
    bench.add("urgent", 1500, priority=-1)
    assert bench.scheduler.num_uncached_tokens == 3000


def test_a_prompt_that_is_preempted_counts_on_nobody_who_waits_for_it() -> None:
    bench = Bench(num_blocks=380, max_batch_tokens=513, max_num_seqs=8)
    first = bench.add("first", 4)
    bench.step()
    bench.add("leader", 1500, first=1)
    bench.step()
    bench.add("follower", 1504, first=1)
    assert bench.kv.allocate(bench.kv.num_free) is not None
    while bench.running() == ["first", "leader"]:  # until the first one's answer needs a block
        plan = bench.scheduler.plan()
        bench.compute(Plan([each for each in plan.work if each[0] is first]))
    assert bench.waiting() == ["leader", "follower"]
    assert bench.scheduler.num_uncached_tokens == 1500 - 512 + 4


def test_a_new_prompt_is_compared_with_the_last_that_wait_ahead_of_it() -> None:
    bench = Bench(num_blocks=8000, max_batch_tokens=100, max_num_seqs=8)
    bench.add("leader", 1000)
    for number in range(63):
        bench.add(f"s{number}", 4, first=number + 1)
    bench.add("near", 1000)
    assert bench.scheduler.num_uncached_tokens == 1000 + 63 * 4 + 4
    for number in range(64):
        bench.add(f"t{number}", 4, first=number + 100)
    bench.add("far", 1000)
    assert bench.scheduler.num_uncached_tokens == 1000 + 63 * 4 + 4 + 64 * 4 + 1000
