"""What part of a queue goes before a newcomer, and what decisions make of it."""

import random

import numpy as np
import pytest

from engine.kv.events import KvEvent
from router.placement import Placed, Refused
from router.policies import PrefixAware
from router.queue_shares import QueueShares
from tests.router.dispatch.workers import Cluster


def test_parts_are_those_of_all_that_is_expected_to_wait_still() -> None:
    rng = random.Random(0)
    for _ in range(50):
        shares, sent, now = QueueShares(), list[tuple[float, int, int, int]](), 0.0
        for _ in range(60):
            match rng.randrange(4):
                case 0 | 1:
                    priority, slot, us = rng.randrange(-2, 3), rng.randrange(6), rng.randrange(1000)
                    until = now + rng.randrange(1, 8)
                    shares.placed(priority, slot, us / 1e6 + 1e-9, until)
                    sent.append((until, priority, slot, us))
                case 2:
                    slot = rng.randrange(6)
                    shares.forget(slot)
                    sent = [each for each in sent if each[2] != slot]
                case _:
                    now += 1.0
            for _ in range(20):  # a few expire with each call
                shares.part_ahead(0, 8, now)
            sent = [each for each in sent if each[0] > now]
            for priority in range(-3, 4):
                part = shares.part_ahead(priority, 8, now)
                if part is None:
                    part = np.ones(8)
                    assert all(each[1] <= priority for each in sent)
                for slot in range(8):
                    total = sum(us for _, _, where, us in sent if where == slot)
                    ahead = sum(us for _, other, where, us in sent if where == slot and other <= priority)
                    assert part[slot] == pytest.approx(ahead / total if total else 1.0)


def flooded(num_prompts: int = 20) -> Cluster:
    """A prefill worker with prompts of 2 s, which it has told of, and another worker that decodes."""
    it = Cluster(["p0", "d0"], policy=PrefixAware(local_prefill_max_tokens=0))
    for number in range(num_prompts):
        it.add(num_tokens=20_000, priority=5)
        (placed,) = it.placement.pump()
        assert isinstance(placed, Placed)
        it.report("p0", queue_s=2.0 * (number + 1))
    it.report("d0", num_running=1)
    return it


def test_an_urgent_request_is_not_refused_for_a_queue_that_it_passes() -> None:
    it = flooded()
    alike = it.add(num_tokens=1000, ttft_s=5.0, priority=5)
    urgent = it.add(num_tokens=1000, ttft_s=5.0)
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
        it.add(num_tokens=20_000)
    assert len(list(it.placement.pump())) == 3
    it.report("p0", queue_s=8.0)  # one that is left, and the three
    it.add(num_tokens=1000)
    (placed,) = it.placement.pump()
    assert isinstance(placed, Placed)
    assert placed.decision.ttft_s == pytest.approx(0.75 * 8.0 + 0.104, abs=0.01)


def test_a_slot_that_is_given_up_leaves_no_queue_to_who_gets_it() -> None:
    for given_up in (lambda it: it.placement.detach("p0"), lambda it: it.placement.apply("p0", KvEvent(cleared=True))):
        it = flooded()
        given_up(it)
        it.attach("p1")
        it.report("p0", draining=True)
        it.report("p1", queue_s=2.0)
        it.add(num_tokens=1000)
        (placed,) = it.placement.pump()
        assert isinstance(placed, Placed)
        assert placed.decision.ttft_s == pytest.approx(2.104, abs=0.01)


def test_a_worker_that_comes_back_has_no_queue() -> None:
    it = flooded()
    it.attach("p0")
    it.report("p0", queue_s=2.0)
    it.add(num_tokens=1000)
    (placed,) = it.placement.pump()
    assert isinstance(placed, Placed)
    assert placed.decision.ttft_s == pytest.approx(2.104, abs=0.01)
