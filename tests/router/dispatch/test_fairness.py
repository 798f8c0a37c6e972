import random

import pytest

from router.admission import Admission, AdmissionConfig
from router.fairness import OUTPUT_WEIGHT, QUANTUM, FairQueue, Place, cost_of
from tests.router.dispatch.workers import Cluster


def queue() -> Admission[str]:
    return Admission(AdmissionConfig(), lambda: 0.0)


def test_tenants_that_wait_get_equal_shares_of_tokens_however_long_their_prompts_are():
    waiting = queue()
    sizes = {"long": 12_000, "short": 700}
    for tenant, size in sizes.items():
        for number in range(2000):
            waiting.add(f"{tenant} {number}", 0, tenant, size)
    tokens = dict.fromkeys(sizes, 0)
    for _ in range(1500):
        tenant = waiting.take().split()[0]
        tokens[tenant] += sizes[tenant]
        assert abs(tokens["long"] - tokens["short"]) <= 2 * max(QUANTUM, *sizes.values())


def test_answers_count_so_tenants_with_short_prompts_take_turns_too():
    it = Cluster(["d0"])
    it.report("d0", draining=True)
    flood = [it.add(5, tenant="flood") for _ in range(30)]
    late = [it.add(5, tenant="late") for _ in range(3)]
    assert it.pump() == []
    it.report("d0")
    order = [placed.candidate for placed in it.pump()]
    assert sorted(order, key=id) == sorted([*flood, *late], key=id)
    assert max(order.index(prompt) for prompt in late) < 8


@pytest.mark.parametrize(("num_prompt", "num_output", "cost"), [(100, 0.0, 100), (5, 256.0, 5 + OUTPUT_WEIGHT * 256)])
def test_a_request_costs_its_prompt_and_twice_its_answer(num_prompt, num_output, cost):
    assert cost_of(num_prompt, num_output) == cost


@pytest.mark.parametrize("seed", range(5))
def test_rounds_that_are_added_at_once_change_no_order(seed):
    """The twin goes round one turn at a time."""
    rng, fair = random.Random(seed), FairQueue[int]()
    costs: dict[str, list[tuple[int, int]]] = {}
    for number in range(400):
        place = Place(number, rng.choice("abcdef"), number, int(QUANTUM * 10 ** rng.uniform(-2, 2.5)))
        fair.push(place)
        costs.setdefault(place.tenant, []).append((number, place.cost))
    turns = list(costs)
    allowance = dict.fromkeys(turns, 0) | {turns[0]: QUANTUM}
    while turns:
        number, cost = costs[turns[0]][0]
        if len(turns) > 1 and cost > allowance[turns[0]]:
            turns = [*turns[1:], turns[0]]
            allowance[turns[0]] += QUANTUM
            continue
        assert fair.take().entry == number
        allowance[turns[0]] -= cost
        costs[turns[0]].pop(0)
        if not costs[turns[0]]:
            turns.pop(0)
            if turns:
                allowance[turns[0]] += QUANTUM
    assert not fair


def test_a_tenant_that_floods_the_queue_does_not_hold_up_one_that_comes_later():
    waiting = queue()
    for number in range(500):
        waiting.add(f"flood {number}", 0, "flood", 4096)
    for _ in range(10):
        waiting.take()
    waiting.add("late", 0, "late", 4096)
    assert "late" in [waiting.take() for _ in range(4)]


def test_nobody_saves_a_share_while_he_has_nothing_to_send():
    waiting = queue()
    for number in range(300):
        waiting.add(f"steady {number}", 0, "steady", QUANTUM)
    waiting.add("idle", 0, "idle", 1)
    for _ in range(100):
        waiting.take()
    for number in range(300):
        waiting.add(f"idle {number}", 0, "idle", QUANTUM)
    taken = [waiting.take().split()[0] for _ in range(100)]
    assert 48 <= taken.count("idle") <= 52


def test_the_turn_of_a_tenant_whose_last_request_leaves_is_the_next_ones():
    waiting = queue()
    for tenant in "abc":
        waiting.add(tenant, 0, tenant, QUANTUM)
    waiting.release("a")
    assert [waiting.take(), waiting.take()] == ["b", "c"]


def test_what_leaves_a_queue_before_its_turn_takes_no_memory():
    waiting = queue()
    for number in range(1000):
        waiting.add(str(number), 0)
    for number in range(1, 1000):
        waiting.release(str(number))
    (line,) = waiting._queues[0]._lines.values()
    assert len(line.heap) <= 2 + 64
    assert waiting.take() == "0"


def test_a_tenant_alone_is_served_first_come_first_whatever_the_sizes():
    rng, waiting = random.Random(0), queue()
    for number in range(200):
        waiting.add(str(number), 0, "only", rng.randrange(10 * QUANTUM))
    assert [waiting.take() for _ in range(200)] == [str(number) for number in range(200)]


def test_priority_goes_before_shares():
    waiting = queue()
    for number in range(20):
        waiting.add(f"a{number}", 0, "a", QUANTUM)
        waiting.add(f"b{number}", 1, "b", 1)
    assert [waiting.take()[0] for _ in range(40)] == ["a"] * 20 + ["b"] * 20


def test_a_retry_costs_its_tenant_nothing():
    waiting = queue()
    for number in range(4):
        waiting.add(f"a{number}", 0, "a", QUANTUM)
        waiting.add(f"b{number}", 0, "b", QUANTUM)
    assert waiting.take() == "a0"
    waiting.put_back("a0")
    assert waiting.take() == "a0"
    assert sorted(waiting.take() for _ in range(2)) == ["a1", "b0"]


@pytest.mark.parametrize("seed", range(3))
def test_whoever_waits_is_served_and_nobody_twice(seed):
    rng, waiting = random.Random(seed), queue()
    expected: set[str] = set()
    for number in range(4000):
        match rng.randrange(4):
            case 0 | 1:
                entry = str(number)
                waiting.add(entry, rng.randrange(2), rng.choice("abc"), rng.randrange(3 * QUANTUM))
                expected.add(entry)
            case 2 if expected:
                head = waiting.head()
                assert waiting.take() == head
                expected.remove(head)
                if rng.random() < 0.3:
                    waiting.put_back(head)
                    expected.add(head)
                else:
                    waiting.release(head)
            case 3 if expected:
                gone = rng.choice(sorted(expected))
                waiting.release(gone)
                expected.remove(gone)
    left = [waiting.take() for _ in range(waiting.num_waiting)]
    assert sorted(left) == sorted(expected)
    assert waiting.head() is None
