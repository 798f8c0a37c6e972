import random

import pytest

from router.admission import Admission, AdmissionConfig
from tests.fakes import FakeClock


def test_priority_then_arrival_and_a_retry_keeps_its_place():
    queue = Admission(AdmissionConfig(), FakeClock(0.0))
    for entry, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        queue.add(entry, priority)
    assert [queue.take(), queue.take()] == ["b", "d"]
    queue.put_back("b")
    assert queue.head() == "b"
    assert [queue.take() for _ in range(3)] == ["b", "a", "c"]
    assert queue.head() is None


def test_the_newest_is_refused_when_more_wait_than_may():
    queue = Admission(AdmissionConfig(max_queue=1), FakeClock(0.0))
    queue.add("a", 0)
    assert queue.refuse_excess() is None
    queue.add("b", 0)
    assert queue.refuse_excess() == "b"
    assert queue.waiting() == ["a"]
    assert queue.head() == "a"


def test_filling_the_queue_keeps_nobody_out():
    queue = Admission(AdmissionConfig(max_queue=3), FakeClock(0.0))
    for number in range(3):
        queue.add(f"flood {number}", 0, "flood")
    queue.add("late", 0, "late")
    assert queue.refuse_excess() == "flood 2"
    queue.add("later", 0, "later")
    assert queue.refuse_excess() == "flood 1"
    queue.add("latest", 0, "latest")
    assert queue.refuse_excess() == "latest"
    queue.add("urgent", -1, "flood")
    assert queue.refuse_excess() == "later"


def test_what_was_dispatched_once_is_not_refused():
    queue = Admission(AdmissionConfig(max_queue=1), FakeClock(0.0))
    for entry in "abc":
        queue.add(entry, 0)
        queue.take()
    for entry in "bca":
        queue.put_back(entry)
    assert queue.refuse_excess() is None
    queue.add("d", 0)
    assert queue.refuse_excess() == "d"
    assert queue.refuse_excess() is None


def test_as_many_run_as_may():
    queue = Admission(AdmissionConfig(max_running=1), FakeClock(0.0))
    queue.add("a", 0)
    queue.add("b", 0)
    queue.take()
    assert queue.head() is None
    queue.release("a")
    assert queue.head() == "b"


def test_retry_after_follows_the_recent_completion_rate():
    clock = FakeClock(0.0)
    queue = Admission(AdmissionConfig(), clock)
    assert queue.retry_after() == 1.0
    for entry in range(10):
        queue.add(entry, 0)
        queue.take()
        clock.now += 2.0
        queue.release(entry)
    queue.add("waiting", 0)
    assert 3.0 <= queue.retry_after() <= 4.0  # two to go, one every 2 s
    clock.now += 3600.0
    assert queue.retry_after() == 1.0  # an hour without requests does not mean that each takes an hour


def test_retry_after_is_as_long_as_what_runs_has_taken_when_nothing_ends():
    clock = FakeClock(0.0)
    queue = Admission(AdmissionConfig(), clock)
    clock.now += 100.0
    for entry in ("first", "second", "third"):
        queue.add(entry, 0)
    queue.take()
    assert queue.retry_after() == 1.0  # a burst says nothing yet
    clock.now += 20.0
    queue.take()
    assert queue.retry_after() == 20.0
    clock.now += 3600.0
    assert queue.retry_after() == 60.0
    queue.release("first")
    queue.release("second")
    clock.now += 61.0
    assert queue.retry_after() == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_a_sorted_list(seed):
    rng = random.Random(seed)
    queue = Admission(AdmissionConfig(max_running=5), FakeClock(0.0))
    waiting: dict[int, tuple[int, int]] = {}
    running: dict[int, tuple[int, int]] = {}
    for entry in range(3000):
        match rng.randrange(5):
            case 0 | 1:
                order = (rng.randrange(3), entry)
                queue.add(entry, order[0])
                waiting[entry] = order
            case 2 if waiting and len(running) < 5:
                first = min(waiting, key=waiting.get)
                assert queue.head() == first
                assert queue.take() == first
                running[first] = waiting.pop(first)
            case 3 if running:
                back = rng.choice(list(running))
                queue.put_back(back)
                waiting[back] = running.pop(back)
            case 4 if waiting or running:
                over = rng.choice([*waiting, *running])
                queue.release(over)
                waiting.pop(over, None)
                running.pop(over, None)
        assert (queue.num_waiting, queue.num_running) == (len(waiting), len(running))
        lines = [line for each in queue._queues.values() for line in each._lines.values()]
        assert sum(len(line.heap) for line in lines) <= 2 * len(waiting) + 65 * len(lines)
