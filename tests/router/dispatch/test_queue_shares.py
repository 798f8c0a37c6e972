"""What part of a queue goes before a newcomer, and what decisions make of it."""

import random
from typing import Any

import numpy as np
import pytest

from engine.kv.events import KvEvent
from router.placement import Placed, Refused
from router.policies import PrefixAware
from router.queue_shares import QueuedPrompt, QueueShares
from tests.router.dispatch.workers import Cluster, Prompt, choose, facts, view, worker


def test_parts_are_those_of_all_that_is_expected_to_wait_still() -> None:
    rng = random.Random(0)
    for _ in range(50):
        shares, sent, now = QueueShares(), list[tuple[float, int, QueuedPrompt, int]](), 0.0
        for _ in range(60):
            match rng.randrange(6):
                case 0 | 1 | 2:
                    us, until = rng.randrange(1, 1000), now + rng.randrange(1, 8)
                    prompt = shares.placed(priority := rng.randrange(-2, 3), rng.randrange(6), us / 1e6 + 1e-9, until)
                    sent.append((until, priority, prompt, us))
                case 3:
                    gone = rng.randrange(6)
                    shares.forget(gone)
                    sent = [each for each in sent if each[2].slot != gone]
                case 4:
                    empty = set(range(6, 12)) - {prompt.slot for _, _, prompt, _ in sent}
                    if empty:
                        shares.move(rng.randrange(6), empty.pop())
                    if sent:
                        shares.drop(sent.pop(rng.randrange(len(sent)))[2])
                case _:
                    now += 1.0
            sent = [each for each in sent if each[0] > now]
            for priority in range(-3, 4):
                part = shares.part_ahead(priority, 12, now)
                if part is None:
                    part = np.ones(12)
                    assert all(each[1] <= priority for each in sent)
                for slot in range(12):
                    total = sum(us for _, _, prompt, us in sent if prompt.slot == slot)
                    ahead = sum(us for _, other, prompt, us in sent if prompt.slot == slot and other <= priority)
                    assert part[slot] == pytest.approx(ahead / total if total else 1.0)


def test_clients_that_make_up_priorities_cost_no_more_than_some() -> None:
    """What cannot be told apart counts as more urgent than it is."""
    shares = QueueShares()
    for priority in range(1000):
        shares.placed(priority, 0, 1.0, until=9.0)
    part = shares.part_ahead(7, 1, now=0.0)
    assert part is not None
    assert part[0] == pytest.approx(8 / 1000)
    part = shares.part_ahead(14, 1, now=0.0)
    assert part is not None
    assert part[0] == pytest.approx(15 / 1000)
    assert shares.part_ahead(15, 1, now=0.0) is None
    shares.placed(-5, 0, 1.0, until=9.0)
    part = shares.part_ahead(-1, 1, now=0.0)
    assert part is not None
    assert part[0] == 0.0
    assert shares.part_ahead(-1, 1, now=10.0) is None  # nothing is left, of any priority


def place(it: Cluster, num_tokens: int, **facts: Any) -> Placed[Prompt]:
    it.add(num_tokens, **facts)
    (placed,) = it.placement.pump()
    assert isinstance(placed, Placed)
    return placed


def flooded(num_prompts: int = 20) -> Cluster:
    """A prefill worker with prompts of 2 s, which it has told of, and another worker that decodes."""
    it = Cluster(["p0", "d0"], policy=PrefixAware(local_prefill_max_tokens=0))
    for number in range(num_prompts):
        place(it, 20_000, priority=5)
        it.report("p0", queue_s=2.0 * (number + 1))
    it.report("d0", num_running=1)
    return it


def test_an_urgent_request_is_not_refused_for_a_queue_that_it_passes() -> None:
    it = flooded()
    alike = it.add(1000, ttft_s=5.0, priority=5)
    urgent = it.add(1000, ttft_s=5.0)
    placed, refused = it.placement.pump()
    assert isinstance(placed, Placed)
    assert isinstance(refused, Refused)
    assert (placed.candidate, refused.candidate) == (urgent, alike)
    # A full step of 8,192 tokens is half over; its own 1,000 take 0.1 s.
    assert placed.decision.ttft_s == pytest.approx((0.004 + 0.8192) / 2 + 0.104, abs=0.01)


def test_what_should_have_been_computed_by_now_is_in_no_queue() -> None:
    it = flooded(5)
    it.clock.now = 9.0
    for _ in range(3):
        it.add(20_000)
    assert len(list(it.placement.pump())) == 3
    it.report("p0", queue_s=8.0)  # one that is left, and the three
    placed = place(it, 1000)
    assert placed.decision.ttft_s == pytest.approx(0.75 * 8.0 + 0.104, abs=0.01)


def test_what_is_over_is_in_no_queue() -> None:
    it = Cluster(["p0", "d0"], policy=PrefixAware(local_prefill_max_tokens=0))
    flood = [it.add(20_000, priority=5) for _ in range(20)]
    assert len(list(it.placement.pump())) == 20
    for prompt in flood[:10]:
        it.placement.release(prompt)
    for prompt in flood[10:]:
        it.placement.put_back(prompt)
        it.placement.release(prompt)
    it.add(20_000)
    assert len(list(it.placement.pump())) == 1
    it.report("p0", queue_s=20.0)
    it.report("d0", num_running=1)
    late = it.add(1000, ttft_s=10.0)
    (refused,) = it.placement.pump()
    assert isinstance(refused, Refused)
    assert refused.candidate is late


def test_what_is_tried_again_is_in_a_queue_once() -> None:
    it = Cluster(["p0", "d0"], policy=PrefixAware(local_prefill_max_tokens=0))
    flood = [it.add(20_000, priority=number % 2) for number in range(20)]
    assert len(list(it.placement.pump())) == 20
    for prompt in flood[1::2]:
        it.placement.put_back(prompt)
    assert len(list(it.placement.pump())) == 10
    it.report("p0", queue_s=40.0)
    it.report("d0", num_running=1)
    placed = place(it, 1000)
    assert placed.decision.ttft_s == pytest.approx(20.104, abs=0.01)


def test_a_worker_that_clears_its_cache_keeps_its_queue() -> None:
    it = flooded()
    it.placement.apply("p0", KvEvent(cleared=True))
    place(it, 1000, ttft_s=5.0)
    it.placement.detach("p0")
    it.attach("p1")  # where it was
    it.report("p1", queue_s=2.0)
    placed = place(it, 1000)
    assert placed.decision.ttft_s == pytest.approx(2.104, abs=0.01)


def test_a_worker_that_leaves_takes_its_queue_along() -> None:
    it = flooded()
    it.placement.detach("p0")
    it.attach("p1")
    it.report("p1", draining=True)
    it.attach("p2")  # in the slot of the first
    it.report("p2", queue_s=2.0)
    placed = place(it, 1000)
    assert placed.decision.ttft_s == pytest.approx(2.104, abs=0.01)


def test_a_decode_worker_that_prefills_computes_the_urgent_first_too() -> None:
    """Its slot is not its position in the pool, and the other one's queue is all of what is urgent."""
    it = Cluster(["p0", "d0", "d1"], policy=PrefixAware())
    it.report("p0", draining=True)
    for number, priority in enumerate((-1, 5)):
        placed = place(it, 20_000, priority=priority)
        it.report(placed.decision.decode, num_running=1, queue_s=2.0)
        if number == 0:
            first = placed.decision.decode
    placed = place(it, 1000)
    assert placed.decision.decode != first
    assert placed.decision.ttft_s == pytest.approx((0.004 + 0.8192) / 2 + 0.104, abs=0.02)


def test_who_passes_all_waits_for_no_more_than_there_is() -> None:
    """Half a step, but no more than the queue."""
    it = flooded(1)
    it.report("p0", queue_s=0.1)
    placed = place(it, 1000)
    assert placed.decision.ttft_s == pytest.approx(0.1 + 0.104, abs=0.01)


def test_a_prompt_that_passes_others_is_sent_on_as_soon_as_it_is_computed() -> None:
    table = view(worker("p0", queue_s=40.0), worker("d0", num_seqs=1))
    costs = []
    for part in (None, np.zeros(2)):
        table.part_ahead = part
        decision = choose(PrefixAware(local_prefill_max_tokens=0), facts(), {}, table)
        assert decision is not None
        costs.append(decision.cost_s)
    assert costs[0] - costs[1] == pytest.approx(40.0 - (0.01 + 8.192) / 2, rel=0.01)
