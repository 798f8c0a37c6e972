import dataclasses
import random

import numpy as np
import pytest

from engine.step_model import StepModel
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.cluster_view import Reservation
from router.costs import Column
from router.policies import LeastLoaded, PrefixAware, RoundRobin, RoutingDecision
from tests.router.dispatch.workers import MODEL, TOKEN_S, attached, choose, facts, view, worker

# Longer prompts go to the prefill workers; where that is not what a test is about.
PREFIX_AWARE = PrefixAware(local_prefill_max_tokens=64)
POLICIES = [RoundRobin(), LeastLoaded(), PREFIX_AWARE]


@pytest.mark.parametrize("policy", POLICIES)
def test_no_decode_worker_means_no_decision(policy):
    assert choose(policy, facts(), {}, view(worker("p0"))) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_without_prefill_worker_decode_prefills(policy):
    assert choose(policy, facts(), {}, view(worker("d0"))).prefill is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_decode_worker_without_blocks_or_slots_gets_nothing(policy):
    full = worker("d0", num_seqs=1, num_free_blocks=60)
    crowded = worker("d1", num_seqs=96)
    assert choose(policy, facts(), {}, view(worker("p0"), full, crowded)) is None
    assert choose(policy, facts(), {}, view(worker("p0"), full, crowded, worker("d2"))).decode == "d2"


def test_blocks_already_on_the_decode_worker_need_no_room():
    nearly_full = worker("d0", num_seqs=1, num_free_blocks=10)
    assert choose(PREFIX_AWARE, facts(), {"d0": 992}, view(nearly_full)).decode == "d0"


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_worker_gets_even_what_it_may_lack_memory_for(policy):
    decision = choose(policy, facts(99_999), {}, view(worker("d0")))
    assert decision.decode == "d0"
    assert decision.cost_s < np.inf


@pytest.mark.parametrize("policy", POLICIES)
def test_no_worker_gets_a_prompt_longer_than_its_sequences_may_be(policy):
    short, long = worker("d0", max_model_len=1000), worker("d1", num_seqs=5, max_model_len=1001)
    assert choose(policy, facts(1000), {"d0": 992}, view(worker("p0"), short, long)).decode == "d1"
    full = worker("d1", num_seqs=5, num_free_blocks=0, max_model_len=1001)
    assert choose(policy, facts(1000), {"d0": 992}, view(worker("p0"), short, full)) is None
    of_two = choose(
        policy, facts(1000), {"p0": 992}, view(worker("p0", max_model_len=1000), worker("p1"), worker("d0"))
    )
    assert of_two.prefill == "p1"
    assert choose(policy, facts(1000), {}, view(worker("p0", max_model_len=1000), worker("d0"))).prefill is None


def test_each_step_of_a_prompt_has_its_base_and_what_decodes_beside_it():
    prefill = choose(PREFIX_AWARE, facts(1000), {}, view(worker("p0", max_batch_tokens=400), worker("d0")))
    assert prefill.ttft_s == pytest.approx(3 * 0.01 + 1000 * TOKEN_S)
    waiting = worker("p0", max_batch_tokens=400)
    waiting.reserve(1, Reservation(prefill_tokens=800))
    behind = choose(PREFIX_AWARE, facts(1000), {}, view(waiting, worker("d0")))
    assert behind.ttft_s == pytest.approx((2 + 3) * 0.01 + 1800 * TOKEN_S)
    local = choose(PREFIX_AWARE, facts(1000), {}, view(worker("d0", max_batch_tokens=500, num_seqs=10)))
    assert local.prefill is None
    assert local.ttft_s == pytest.approx(2 * 0.01 + 1000 * TOKEN_S + 2.5 * 10 * TOKEN_S)


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_workers_take_turns(policy):
    workers = view(*(worker(each) for each in ("p0", "p1", "p2", "d0", "d1", "d2")))
    decisions = [choose(policy, facts(), {}, workers, turn) for turn in range(6)]
    assert sorted(each.prefill for each in decisions) == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert sorted(each.decode for each in decisions) == ["d0", "d0", "d1", "d1", "d2", "d2"]


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_that_just_failed_are_avoided_unless_nobody_else_can_decode(policy):
    workers = view(*(worker(each) for each in ("p0", "p1", "d0", "d1")))
    for turn in range(4):
        decision = choose(policy, facts(excluded=frozenset({"p0", "d1"})), {}, workers, turn)
        assert (decision.prefill, decision.decode) == ("p1", "d0")
    decision = choose(policy, facts(excluded=frozenset({"p0", "d0"})), {}, view(worker("p0"), worker("d0")))
    assert (decision.prefill, decision.decode) == (None, "d0")


@pytest.mark.parametrize("policy", POLICIES)
def test_fingerprints_of_a_pair_are_equal(policy):
    rng = random.Random(1)
    for turn in range(200):
        workers = [worker(f"{role}{i}", fingerprint=rng.choice("abc")) for role in "pd" for i in range(4)]
        by_id = {each.worker_id: each for each in workers}
        decision = choose(policy, facts(), {}, view(*workers), turn)
        if decision.prefill is not None:
            assert by_id[decision.prefill].description.fingerprint == by_id[decision.decode].description.fingerprint


def test_prefix_aware_goes_where_the_prefix_is_until_the_queue_there_is_longer():
    def pick(queue: int) -> str | None:
        workers = view(worker("p0", queue_s=queue * TOKEN_S), worker("p1"), worker("d0"))
        return choose(PREFIX_AWARE, facts(), {"p0": 800}, workers).prefill

    assert (pick(0), pick(799), pick(801)) == ("p0", "p0", "p1")


def test_a_fast_worker_is_worth_a_wait_and_a_long_past_is_not_free():
    fast = StepModel(base_s=0.01, prefill_token_s=TOKEN_S / 4, pair_s=0.0, decode_s=TOKEN_S, kv_token_s=0.0)

    def pick(queue: int, **matches: int) -> str | None:
        workers = view(worker("p0", model=fast, queue_s=queue * TOKEN_S), worker("p1"), worker("d0"))
        return choose(PREFIX_AWARE, facts(), matches, workers).prefill

    assert (pick(740), pick(760)) == ("p0", "p1")
    assert pick(600, p1=496) == "p1"
    attentive = dataclasses.replace(MODEL, pair_s=TOKEN_S / 100)  # then 500 tokens after 500 take as long as ever
    workers = view(worker("p0", model=attentive), worker("p1", queue_s=0.4), worker("d0"))
    assert choose(PREFIX_AWARE, facts(), {"p0": 496, "p1": 496}, workers).prefill == "p1"


def test_a_newcomer_goes_where_it_delays_the_decoding_least():
    slow = dataclasses.replace(MODEL, decode_s=4 * TOKEN_S)
    long = dataclasses.replace(MODEL, kv_token_s=TOKEN_S / 100)
    for other in (slow, long):
        few = worker("d0", model=other, num_seqs=3)
        assert choose(PREFIX_AWARE, facts(), {}, view(worker("p0"), few, worker("d1", num_seqs=8))).decode == "d1"
        assert choose(PREFIX_AWARE, facts(), {}, view(worker("p0"), few, worker("d1", num_seqs=40))).decode == "d0"


def test_memory_in_use_counts_as_the_sequences_it_would_hold():
    """800 of 1,000 blocks are those of 51 of 64 sequences."""
    table = view(worker("d0", num_seqs=3, num_free_blocks=200), worker("d1", num_seqs=5, num_free_blocks=950))
    assert choose(LeastLoaded(), facts(), {}, table).decode == "d1"


def test_the_queue_of_a_worker_is_in_seconds_once_it_knows_its_speed():
    state = attached("p0")

    def queue() -> tuple[StepModel | None, float, int]:
        return state.model, state.row().queue_s, state.row().num_waiting_tokens

    state.report(pb.Load(num_waiting_tokens=1000))
    assert queue() == (None, 0.0, 1000)
    exact = StepModel(0.5, 0.25, 0.0, 0.125, 0.0)  # floats that the wire does not round
    state.report(pb.Load(num_waiting_tokens=1000, queue_us=3_000_000, model=model_to_pb(exact)))
    assert queue() == (exact, 3.0, 0)
    state.reserve(1, Reservation(8))
    assert queue() == (exact, 3.0, 8)


@pytest.mark.parametrize("policy", [LeastLoaded(), PREFIX_AWARE])
def test_a_worker_that_has_not_run_is_taken_for_one_like_the_others(policy):
    slow = dataclasses.replace(MODEL, prefill_token_s=1.0)

    def pick(queue: float, waiting: int) -> str | None:
        workers = view(
            worker("p0", model=slow, queue_s=queue), worker("p1", model=None, num_waiting_tokens=waiting), worker("d0")
        )
        return choose(policy, facts(), {}, workers).prefill

    assert (pick(90.0, 100), pick(110.0, 100)) == ("p0", "p1")
    nobody_knows = view(worker("p0", model=None, num_waiting_tokens=9), worker("p1", model=None), worker("d0"))
    assert choose(policy, facts(), {}, nobody_knows).prefill == "p1"


def test_a_decode_worker_that_never_prefilled_does_not_seem_to_do_it_for_nothing():
    never = dataclasses.replace(MODEL, prefill_token_s=0.0)
    busy = view(worker("p0"), worker("d0", model=never, queue_s=50 * TOKEN_S))
    assert choose(PREFIX_AWARE, facts(), {"d0": 944, "p0": 992}, busy).prefill == "p0"


def test_requests_spread_even_where_one_more_sequence_seems_to_cost_nothing():
    free = dataclasses.replace(MODEL, decode_s=0.0)
    workers = view(worker("p0"), worker("d0", model=free, num_seqs=40), worker("d1", model=free))
    assert choose(PREFIX_AWARE, facts(), {}, workers).decode == "d1"


def test_prefix_aware_prefers_the_decode_worker_that_holds_the_prefix_while_loads_are_equal():
    decoders = [worker("d0"), worker("d1")]
    assert choose(PREFIX_AWARE, facts(), {"d1": 640}, view(worker("p0"), *decoders)).decode == "d1"
    decoders[1] = worker("d1", num_seqs=10)
    assert choose(PREFIX_AWARE, facts(), {"d1": 640}, view(worker("p0"), *decoders)).decode == "d0"


def test_a_short_rest_is_prefilled_locally_unless_the_decode_worker_is_busy_prefilling():
    def pick(policy: PrefixAware, matched: int, waiting: int = 0) -> str | None:
        workers = view(worker("p0"), worker("d0", queue_s=waiting * TOKEN_S))
        return choose(policy, facts(), {"d0": matched, "p0": 992}, workers).prefill

    assert pick(PREFIX_AWARE, 944) is None
    assert pick(PREFIX_AWARE, 928) == "p0"
    assert pick(PREFIX_AWARE, 944, waiting=500) == "p0"
    assert pick(PrefixAware(local_prefill_max_tokens=0), 992) == "p0"
    assert pick(PrefixAware(local_prefill_max_tokens=72), 928) is None  # more than one step of 64 tokens, if asked


@pytest.mark.parametrize(
    ("part", "expected"),  # of the time to compute a token, the time to move one
    [(0.0, "p0"), (0.5, "p0"), (0.9, "p0"), (2.5, None), (float("inf"), "p0"), (float("nan"), "p0")],
)
def test_what_takes_much_longer_to_move_than_to_compute_is_prefilled_locally(part, expected):
    decode = worker("d0", num_seqs=2, transfer_token_s=part * TOKEN_S)
    assert choose(PrefixAware(), facts(), {}, view(worker("p0"), decode)).prefill == expected
    assert choose(PrefixAware(local_prefill_max_tokens=999), facts(), {}, view(worker("p0"), decode)).prefill == "p0"


def test_full_prefill_workers_are_helped_by_decode_workers_but_nobody_waits_longer_there_than_in_their_queue():
    def pick(prefill_wait: float, decode_wait: float, num_seqs: int = 5) -> str | None:
        table = view(worker("p0", queue_s=prefill_wait), worker("d0", queue_s=decode_wait, num_seqs=num_seqs))
        for second in range(60):  # three times as much as the prefill worker can compute
            table.demand.on_prefill.placed(3.0, float(second))
        table.now, table.num_own = 60.0, num_seqs
        return choose(PrefixAware(), facts(), {}, table).prefill

    assert pick(0.0, 0.0, num_seqs=8) == "p0"
    assert pick(1.0, 0.0, num_seqs=8) is None
    assert pick(1.0, 0.0, num_seqs=80) == "p0"
    assert pick(1.0, 0.9) is None
    assert pick(1.0, 1.3) == "p0"


def test_one_pool_prices_the_work_of_a_prompt_as_prefill_workers_do():
    """The holder of 800 of 1,000 tokens is a second behind, in a pool of two that is full for a second."""

    def pick(prompts_per_s: float) -> str:
        table = view(worker("d0", queue_s=2.0), worker("d1", queue_s=1.0))
        for number in range(round(60 * prompts_per_s)):
            table.demand.on_decode.placed(0.9, number / prompts_per_s)
        table.now, table.num_own = 60.0, 4
        return choose(PrefixAware(), facts(), {"d0": 800}, table).decode

    assert pick(0.1) == "d1"
    assert pick(2.0) == "d0"


@pytest.mark.parametrize(("tpot_s", "wait"), [(0.05, 8.1), (0.5, 0.81)])
def test_a_long_prompt_does_not_wait_for_long_where_few_sequences_run(tpot_s, wait):
    """A second of prefill, which 30 sequences stand still for, a second of which costs 0.4 * 40 ms / `tpot_s`, or 10,
    where it costs half of that: the further steps are from the limit, the less a wait is worth."""

    def pick(wait: float) -> str:
        table = view(worker("d0", num_seqs=30), worker("d1", num_seqs=10, queue_s=wait))
        table.demand.mean_output = 1.0
        return choose(PrefixAware(tpot_s=tpot_s), facts(), {}, table).decode

    assert pick(0.9 * wait) == "d1"
    assert pick(1.1 * wait) == "d0"


@pytest.mark.parametrize(("free", "wait"), [(500, 0.125), (200, 0.8), (100, 2.025), (80, 2.645)])
def test_decode_workers_prefill_less_the_fuller_their_memory_is(free, wait):
    """Its five sequences give their memory back later by a second of prefill; a twentieth of as many as have it wait
    for that, in proportion to what is taken and to what is left. Answers have no price here."""

    def pick(queue_s: float) -> str | None:
        table = view(worker("p0", queue_s=queue_s), worker("d0", num_seqs=5, num_free_blocks=free))
        return choose(PrefixAware(answer_price=0.0), facts(), {}, table).prefill

    handoff_s = 64 * TOKEN_S
    assert pick(wait - handoff_s + 0.05) is None
    assert pick(wait - handoff_s - 0.05) == "p0"


def test_the_sequences_of_a_pool_are_those_that_its_workers_have_now():
    states = [worker("d0", num_seqs=5), worker("d1", num_seqs=7), worker("p0")]
    table = view(*states)
    for num_seqs in (9, 9, 0, 3):
        states[0].report(pb.Load(num_running=num_seqs, num_free_blocks=900))
        table.dirty.add(states[0])
        table.refresh()
        assert table.decode.total_seqs == num_seqs + 7
    table.remove(states[1])
    table.refresh()
    assert table.decode.total_seqs == 3


def test_a_part_of_a_block_takes_all_of_it():
    """A prompt of 1,000 tokens and 100 to come are 68.75 blocks."""

    def pick(free: int) -> RoutingDecision | None:
        return choose(PREFIX_AWARE, facts(), {}, view(worker("d0", num_seqs=1, num_free_blocks=free)))

    assert pick(68) is None
    assert pick(69) is not None


def test_sequences_that_wait_for_their_prefill_stand_still_for_the_next_one_too():
    def pick(num_waiting: int) -> str:
        queued = worker("d1")
        load = pb.Load(num_running=2, num_waiting=num_waiting, num_free_blocks=900, queue_us=1_000_000)
        load.model.CopyFrom(model_to_pb(MODEL))
        queued.report(load)
        table = view(worker("d0", num_seqs=12), queued)
        table.demand.mean_output = 1.0
        return choose(PrefixAware(), facts(), {}, table).decode

    assert pick(0) == "d1"
    assert pick(10) == "d0"


def test_a_transfer_hides_behind_prefill_and_the_queue_of_a_link_behind_that_for_prefill():
    def pick(link: int, queue_s: float = 0.0, cached: int = 0) -> str:
        idle = worker("d0", transfer_token_s=TOKEN_S / 2, num_pull_tokens=link)
        busy = worker("d1", transfer_token_s=TOKEN_S / 2, num_seqs=1)  # a sequence more costs 0.3 s
        policy = PrefixAware(local_prefill_max_tokens=0)
        return choose(policy, facts(), {"p0": cached}, view(worker("p0", queue_s=queue_s), idle, busy)).decode

    assert pick(900) == "d0"  # 0.45 s of queue and 0.5 s of transfer, behind 1 s of prefill
    assert pick(3000) == "d1"
    assert pick(3000, queue_s=1.5) == "d0"
    assert pick(900, cached=960) == "d1"  # with nothing to hide behind


def test_what_a_transfer_does_not_hide_behind_costs_as_long():
    """It begins when the prefill worker's queue of 1.5 s is empty, and takes 2 s, of which 1.01 s are computed."""
    table = view(worker("p0", queue_s=1.5), worker("d0", num_seqs=1, transfer_token_s=2 * TOKEN_S))
    decision = choose(PREFIX_AWARE, facts(), {}, table)
    assert decision.ttft_s == pytest.approx(2.51, rel=1e-6)
    route_s = 2.51 + 64 * TOKEN_S + (1.5 + 2.0 - 2.51) + 0.1 * 2.0
    num_seqs = np.exp(-2.51 / 0.011 / 256)  # of the other one, by the end of prefill
    step_s = 0.01 + (num_seqs + 1) * 0.001
    answers_s = 100 * step_s + num_seqs * 0.001 * 256
    assert decision.cost_s == pytest.approx(route_s + 0.4 * (step_s / 0.05) * answers_s, rel=1e-6)


def test_a_worker_that_has_pulled_nothing_is_taken_to_need_a_tenth_of_the_time_to_compute_a_token():
    assert view(worker("d0")).decode[Column.TRANSFER_TOKEN_S][0] == pytest.approx(0.1 * TOKEN_S, rel=1e-6)


def test_tokens_to_pull_count_from_the_decision_on():
    state = worker("d0", transfer_token_s=0.25, num_pull_tokens=8)
    assert view(state).decode[Column.PULL_WAIT_S][0] == 2.0
    state.reserve(1, Reservation(pull_tokens=4))
    assert view(state).decode[Column.PULL_WAIT_S][0] == 3.0
    state.counted(1)
    assert view(state).decode[Column.PULL_WAIT_S][0] == 2.0


def test_a_burst_between_two_reports_spreads_over_the_workers():
    states = [worker(each, model=None) for each in ("p0", "p1", "d0", "d1")]
    by_id = {state.worker_id: state for state in states}
    chosen = []
    for turn in range(8):
        decision = choose(PREFIX_AWARE, facts(), {}, view(*states), turn)
        by_id[decision.prefill].reserve(turn, Reservation(1000))
        by_id[decision.decode].reserve(turn, Reservation(blocks=63))
        chosen += [decision.prefill, decision.decode]
    assert {each: chosen.count(each) for each in chosen} == {"p0": 4, "p1": 4, "d0": 4, "d1": 4}


def test_a_reservation_counts_until_the_workers_own_report_covers_it():
    state = attached("d0")

    def report(num_submits: int = 0) -> tuple[int, int, int]:
        state.report(pb.Load(num_free_blocks=100), num_submits)
        row = state.row()
        return row.num_seqs, row.num_free_blocks, row.num_waiting_tokens

    report()
    state.reserve(1, Reservation(500, blocks=40))
    state.reserve(2, Reservation(100, blocks=20))
    state.reserve(3, Reservation(10, blocks=1))
    assert report() == report(7) == (3, 39, 610)  # nothing is sent yet
    state.sent(2)
    state.sent(1)
    assert report() == (3, 39, 610)  # a heartbeat of a long step, which does not know
    assert report(1) == report(1) == report() == (2, 59, 510)  # the first that was sent, and once
    state.counted(1)  # its worker said so
    assert report(2) == (1, 99, 10)
    state.sent(3)
    assert report(2) == (1, 99, 10)
    assert report(3) == (0, 100, 0)
    state.reserve(4, Reservation(blocks=10))
    state.counted(4)
    state.counted(4)
    assert state.row().num_seqs == 0


@pytest.mark.parametrize(
    ("max_num_seqs", "seqs_per_slot", "expected"), [(4, 1.5, 6), (3, 1.5, 4), (1, 1.5, 1), (1, 0.5, 1)]
)
def test_a_worker_may_always_hold_one_sequence_and_never_a_part_of_one(max_num_seqs, seqs_per_slot, expected):
    state = attached("d0", seqs_per_slot=seqs_per_slot, max_num_seqs=max_num_seqs)
    assert state.row().seq_limit == expected


@pytest.mark.parametrize(("role", "expected"), [("decode", 12), ("prefill", 5)])
def test_pulls_count_as_sequences_of_a_decode_worker_and_leases_not_of_a_prefill_worker(role, expected):
    state = attached("w", role=role)
    state.report(pb.Load(num_running=3, num_waiting=2, num_handoffs=7))
    assert state.row().num_seqs == expected
