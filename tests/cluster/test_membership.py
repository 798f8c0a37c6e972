"""The judgement of `MembershipView`, against random scans and a fleet whose truth is known."""

import random

from cluster.registry.base import Lease, MembershipView, WorkerRecord
from cluster.spec import WorkerId
from router.membership import Joined, Left

TTL = 6.0


def record(worker_id: str, epoch: int = 1, address: str = "h:1") -> WorkerRecord:
    return WorkerRecord(WorkerId(worker_id), "decode", address, epoch, "tiny")


def lease(worker_id: str, epoch: int = 1, *, left: bool = False, address: str = "h:1") -> Lease:
    return Lease(record(worker_id, epoch, address), TTL, left)


def joined(worker_id: str, epoch: int = 1, address: str = "h:1") -> Joined:
    return Joined(worker_id, "decode", address, epoch)


def test_newcomers_join_once() -> None:
    view = MembershipView(TTL)
    assert view.observe([lease("a"), lease("b")], 0) == [joined("a"), joined("b")]
    assert view.observe([lease("b"), lease("a")], 1) == []


def test_a_goodbye_is_believed_at_once() -> None:
    view = MembershipView(TTL)
    view.observe([lease("a")], 0)
    assert view.observe([lease("a", left=True)], 0.1) == [Left("a")]
    assert view.observe([lease("a", left=True)], 0.2) == []
    assert view.observe([], 0.3) == []


def test_a_worker_that_said_goodbye_before_is_not_announced() -> None:
    assert MembershipView(TTL).observe([lease("a", left=True)], 0) == []


def test_another_epoch_or_address_is_another_worker() -> None:
    view = MembershipView(TTL)
    view.observe([lease("a", 1)], 0)
    assert view.observe([lease("a", 2)], 1) == [Left("a"), joined("a", 2)]
    assert view.observe([lease("a", 2, address="h:2")], 2) == [Left("a"), joined("a", 2, "h:2")]


def test_silence_is_believed_after_a_time_to_live() -> None:
    view = MembershipView(TTL)
    view.observe([lease("a")], 0)
    assert view.observe([], 10) == []
    assert view.observe([], 10 + TTL - 0.1) == []
    assert view.observe([], 10 + TTL) == [Left("a")]


def test_a_store_that_lost_its_data_loses_no_worker() -> None:
    view = MembershipView(TTL)
    view.observe([lease("a"), lease("b")], 0)
    assert view.observe([], 1) == []
    assert view.observe([lease("a")], 2) == []
    assert view.observe([lease("a"), lease("b")], 3) == []
    assert view.observe([], 3.5 + TTL) == []  # the earlier silence does not count any more


def test_a_worker_comes_back_under_its_own_name() -> None:
    view = MembershipView(TTL)
    view.observe([lease("a")], 0)
    view.observe([lease("a", left=True)], 1)
    assert view.observe([lease("a", 2)], 2) == [joined("a", 2)]


def test_events_always_lead_to_what_was_seen() -> None:
    """Whatever the scans show, a consumer that applies the events knows every worker seen, in its latest life."""
    rng = random.Random(7)
    for _ in range(300):
        view, known, now = MembershipView(TTL), {}, 0.0
        for _ in range(30):
            now += rng.choice([0.25, 1.0, TTL])
            seen = [lease(worker, rng.randrange(3), left=rng.random() < 0.2) for worker in "abc" if rng.random() < 0.7]
            for event in view.observe(seen, now):
                if isinstance(event, Joined):
                    assert event.worker_id not in known
                    known[event.worker_id] = event.epoch
                else:
                    del known[event.worker_id]
            present = {each.record.worker_id: each.record.epoch for each in seen if not each.left}
            said_goodbye = {each.record.worker_id for each in seen if each.left}
            assert present.items() <= known.items()
            assert not said_goodbye & known.keys()
