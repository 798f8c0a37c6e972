"""Prompts that begin alike: who waits for whose blocks, what that counts for, and what is told of it."""

import pytest

from engine.kv.block_hash import block_hashes
from engine.scheduler import Plan
from tests.engine.test_scheduler import SIZE, Bench


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
    assert bench.step() == {"first": 1000, "later": 1}


def test_a_cancelled_prompt_may_share_its_beginning_with_one_whose_last_block_is_not_computed() -> None:
    """The answer of `middle` has filled a block, which gets its hash when it is computed; then it was preempted."""
    bench = Bench(num_blocks=7, max_batch_tokens=64, max_num_seqs=4)
    bench.add("first", 12, priority=-1, first=1)
    bench.add("middle", 15)
    bench.step()
    last = bench.add("last", 21, priority=5)
    bench.step()
    assert bench.waiting() == ["middle", "last"]
    bench.scheduler.remove(last)
    assert bench.waiting() == ["middle"]


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
    assert bench.scheduler.turns.take(0, "y", 10) == 0


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
