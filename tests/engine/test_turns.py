"""Shares of tokens among tenants, in the order that turns give."""

import random
from collections import Counter

from engine.turns import Turns


def serve(waiting: list[tuple[int, int, str, int]], turns: Turns, num_tokens: int) -> Counter[str]:
    """Takes prompts of (turn, arrival, tenant, tokens) until so many tokens were served."""
    served: Counter[str] = Counter()
    while waiting and served.total() < num_tokens:
        waiting.sort()
        begin, _, tenant, size = waiting.pop(0)
        turns.reached(0, begin)
        served[tenant] += size
    return served


def test_tenants_that_wait_get_equal_shares_of_tokens_however_long_their_prompts_are() -> None:
    rng, turns, waiting = random.Random(0), Turns(), []
    for arrival in range(3000):
        tenant = rng.choice("aaaaaab")  # a sends six times as many, b's are ten times as long
        size = rng.randrange(50, 150) * (10 if tenant == "b" else 1)
        waiting.append((turns.take(0, tenant, size), arrival, tenant, size))
    served = serve(waiting, turns, 100_000)
    assert abs(served["a"] - served["b"]) <= 2 * 1500


def test_one_tenant_is_served_first_come_first() -> None:
    turns, rng = Turns(), random.Random(1)
    begins = []
    for _ in range(200):
        begins.append(turns.take(0, "a", rng.randrange(1, 100)))
        if rng.random() < 0.3:
            turns.reached(0, rng.choice(begins))
    assert begins == sorted(begins)


def test_a_newcomer_begins_where_service_is_and_is_owed_nothing_for_the_time_before() -> None:
    turns = Turns()
    first = [turns.take(0, "a", 100) for _ in range(10)]
    assert turns.take(0, "b", 100) == 0
    for begin in first[:6]:
        turns.reached(0, begin)
    assert [turns.take(0, "c", 100) for _ in range(2)] == [500, 600]
    assert turns.take(0, "b", 100) == 500


def test_tenants_with_nothing_ahead_are_forgotten() -> None:
    turns = Turns()
    for number in range(100_000):
        turns.reached(0, turns.take(0, str(number), 10))
        turns.reached(0, turns.take(0, "busy", 10))
    assert len(turns._ends) <= 1100


def test_an_urgent_prompt_of_a_tenant_carries_nobody_past_what_else_he_has_waiting() -> None:
    turns = Turns()
    assert [turns.take(0, "a", 100) for _ in range(10)] == list(range(0, 1000, 100))
    urgent = turns.take(-1, "a", 100)
    turns.reached(-1, urgent)
    assert turns.take(0, "b", 100) == 0
    assert turns.take(-1, "b", 100) == urgent
    assert (turns.take(-1, "a", 100), turns.take(0, "a", 100)) == (100, 1000)


def test_priorities_with_nothing_ahead_are_forgotten_and_their_lines_never_go_back() -> None:
    turns, begins = Turns(), dict[int, int]()
    turns.take(-7, "waits", 10)
    for number in range(20_000):
        priority = number % 5000
        begin = turns.take(priority, "a", 10)
        assert begin >= begins.get(priority, 0)
        begins[priority] = begin + 10
        turns.reached(priority, begin)
        turns.reached(priority, begin + 10)
    assert len(turns._ends) <= 1100
    assert len(turns._served) <= 1100
    assert turns.take(-7, "waits", 10) >= 10
