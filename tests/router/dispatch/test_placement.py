"""Placement driven as the dispatcher and the simulator drive it, with workers that are a few numbers."""

import math

import pytest

from engine.kv.events import KvEvent
from engine.step_model import StepModel, StepWork, num_pairs
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.admission import AdmissionConfig
from router.affinity import Affinity, Turn
from router.block_table import Hashes
from router.cluster_view import Reservation
from router.costs import Column
from router.placement import Placed, PlacementConfig, Refused
from router.policies import RequestFacts, RoundRobin
from tests.router.dispatch.workers import BLOCK, FAST_MODEL, Cluster, Prompt


def chain(first: int, num_tokens: int) -> list[int]:
    return list(range(first, first + num_tokens // BLOCK))


def test_workers_that_attach_leave_drain_and_close_are_used_and_not_used():
    it = Cluster(["p0", "d0"])
    assert (it.place().decision.prefill, it.place().decision.decode) == ("p0", "d0")
    it.states["p0"].closed = True
    assert it.place().decision.prefill is None
    it.attach("p1")
    assert it.place().decision.prefill == "p1"
    it.report("p1", draining=True)
    it.states["p0"].closed = False
    assert it.place().decision.prefill == "p0"
    it.placement.detach("p0")
    it.placement.detach("p0")
    it.report("p1")
    assert it.place().decision.prefill == "p1"
    it.placement.detach("d0")
    it.add()
    assert it.pump() == []
    it.attach("d1")
    assert [each.decision.decode for each in it.pump()] == ["d1"]


def test_the_index_follows_events_clears_and_new_lives():
    it = Cluster(["p0", "p1", "d0"])
    prompt = chain(1, 1600)

    def hit() -> tuple[str | None, int]:
        it.clock.now += 60.0  # what was on its way has come
        it.report("p0")
        it.report("p1")
        placed = it.place(1600, prompt)
        for state in it.states.values():
            state.counted(it.handle)
        assert placed.on_prefill.prefill_tokens + placed.on_prefill.prefill_past == 1600
        return placed.decision.prefill, placed.decision.hit_tokens

    it.placement.apply("p1", KvEvent(stored=tuple(prompt[:90])))
    assert hit() == ("p1", 1440)
    it.placement.apply("p1", KvEvent(removed=tuple(prompt[50:90])))
    assert hit() == ("p1", 800)
    it.placement.apply("p1", KvEvent(stored=tuple(prompt[:20]), cleared=True))
    assert hit() == ("p1", 320)
    assert it.placement.num_blocks("p1") == 20
    it.attach("p1", prompt[:70])
    assert hit() == ("p1", 1120)
    it.attach("p1")
    assert hit()[1] == 0


def test_a_burst_spreads_as_each_decision_counts_the_ones_before():
    it = Cluster(["p0", "p1", "p2", "d0", "d1"])
    for _ in range(12):
        it.add()
    placed = it.pump()
    assert sorted(each.decision.prefill for each in placed) == sorted(["p0", "p1", "p2"] * 4)
    assert sorted(each.decision.decode for each in placed) == sorted(["d0", "d1"] * 6)


def test_what_does_not_fit_in_the_queue_is_refused_newest_first():
    it = Cluster(["d0"], PlacementConfig(AdmissionConfig(max_queue=2, max_running=1)))
    first, second, third, fourth = (it.add() for _ in range(4))
    outcomes = it.pump()
    assert [(type(each), each.candidate) for each in outcomes] == [(Placed, first), (Refused, fourth)]
    assert it.placement.waiting() == [second, third]
    it.placement.put_back(first)  # more wait now than may, but nobody who was let in is refused
    it.placement.add(fifth := Prompt(RequestFacts(16, 1)))
    assert [each.candidate for each in it.pump()] == [first, fifth]
    it.placement.put_back(first)
    urgent = it.add(priority=-1)  # is placed, so it is not one more that waits
    assert [each.candidate for each in it.pump()] == [urgent]
    assert it.placement.waiting() == [second, third, first]


def test_a_report_tells_whether_somebody_waits():
    it = Cluster(["p0"])
    assert not it.placement.reported()
    it.add()
    assert it.pump() == []
    assert it.placement.reported()


def test_a_decision_never_waits_for_the_reports_of_many_workers():
    it = Cluster([*(f"p{i}" for i in range(40)), *(f"d{i}" for i in range(40))])
    it.place(1600)
    for state in it.states.values():
        it.report(state.worker_id, queue_s=1.0 if state.worker_id == "p7" else 2.0)
        it.placement.reported()
        assert len(it.placement._table.dirty) < 16
    assert it.place(1600).decision.prefill == "p7"


def test_a_hot_prefix_is_computed_elsewhere_once_its_holder_is_the_bottleneck():
    """Requests of 1,600 new tokens (0.16 s) after a shared 8,000: the holder alone cannot take 20 of them a second."""
    it = Cluster([*(f"p{i}" for i in range(4)), "d0", "d1"])
    prefix = chain(1, 8000)
    it.placement.apply("p0", KvEvent(stored=tuple(prefix)))
    busy_until = dict.fromkeys(("p0", "p1", "p2", "p3"), 0.0)
    holders: list[int] = []
    waits: list[float] = []
    for number in range(400):
        it.clock.now = number * 0.05
        for worker_id, until in busy_until.items():
            it.report(worker_id, queue_s=max(0.0, until - it.clock.now))
        own = chain(10_000 + 1000 * number, 1600)
        placed = it.place(9600, prefix + own)
        worker_id = placed.decision.prefill
        assert worker_id is not None
        start = max(it.clock.now, busy_until[worker_id])
        work = placed.on_prefill
        pairs = num_pairs(work.prefill_tokens, work.prefill_past)
        busy_until[worker_id] = start + FAST_MODEL.seconds(StepWork(work.prefill_tokens, pairs))
        waits.append(busy_until[worker_id] - it.clock.now)
        it.placement.apply(worker_id, KvEvent(stored=tuple(prefix + own)))
        for state in it.states.values():
            state.counted(it.handle)
        it.placement.release(placed.candidate, 100)
        holders.append(sum(it.placement.num_blocks(each) >= len(prefix) for each in busy_until))
    assert holders[0] == 1  # the prefix alone is where it was
    assert holders[-1] == 4
    assert max(waits[200:]) < 1.0  # 0.16 s without any queue; the holder alone would be 40 s behind by the end


def test_where_the_holder_keeps_up_a_prefix_stays_on_one_worker():
    it = Cluster(["p0", "p1", "d0"])
    prefix = chain(1, 8000)
    it.placement.apply("p0", KvEvent(stored=tuple(prefix)))
    for number in range(50):
        it.clock.now = float(number)
        it.report("p0")
        it.report("p1")
        placed = it.place(8160, prefix + chain(10_000 + 1000 * number, 160))
        assert placed.decision.prefill == "p0"
        for state in it.states.values():
            state.counted(it.handle)


def test_the_next_turn_of_a_session_goes_where_the_last_one_was_before_the_index_knows():
    it = Cluster([*(f"p{i}" for i in range(4)), *(f"d{i}" for i in range(4))])

    def turn(num_tokens: int, **facts) -> Placed[Prompt]:
        """Placed and prefilled; it still decodes."""
        placed = it.place(num_tokens, chain(1, num_tokens), **facts)
        assert placed.prefill is not None
        placed.prefill.counted(it.handle)
        return placed

    first = turn(3200, session="s")
    it.clock.now += 60.0  # by then the prompt alone is not believed to be there any more
    turn(3200)
    second = turn(4800, session="s")
    assert second.decision.prefill == first.decision.prefill
    assert second.decision.hit_tokens == 3200
    it.clock.now += 60.0
    assert turn(4800, session="s", tenant="another").decision.hit_tokens == 0
    it.placement.release(first.candidate, 100)
    it.placement.release(second.candidate, 160)
    third = turn(6400, session="s")
    assert third.decision.hit_tokens == 4800
    blocks_of_answer = 159 // BLOCK  # its last token has no KV
    without = -(-(6400 + 200) // BLOCK)
    assert third.decision.decode == second.decision.decode
    assert third.on_decode.blocks == without - 4800 // BLOCK - blocks_of_answer


def test_a_session_counts_no_less_than_the_index_knows_and_no_more_than_the_prompt_has():
    it = Cluster(["p0", "d0"])
    it.place(1600, chain(1, 1600), session="s")
    it.placement.apply("p0", KvEvent(stored=tuple(chain(1, 3040))))  # another client's prompt
    assert it.place(3200, chain(1, 3200), session="s").decision.hit_tokens == 3040
    it = Cluster(["p0", "d0"])
    first = it.place(1600, chain(1, 1600), session="s")
    it.placement.release(first.candidate, 501)
    again = it.place(1616, chain(1, 1616), session="s")
    assert (again.decision.prefill, again.decision.hit_tokens) == (None, 1616)
    assert again.on_decode.blocks == -(-(1616 + 200) // BLOCK) - 1616 // BLOCK


def test_the_sessions_seen_last_are_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("router.affinity._MAX_SESSIONS", 2)
    sessions, turn = Affinity(), Turn("p0", "d0", 1600, BLOCK, 100, 7)
    for name in ("a", "b", "a", "c"):
        sessions.placed(("", name), turn)
    assert [sessions.last(("", name), 0.0) for name in "abc"] == [turn, None, turn]


def test_a_session_that_paused_is_believed_to_be_where_the_index_says():
    it = Cluster(["p0", "p1", "d0"])
    first = it.place(3200, chain(1, 3200), session="s")
    it.placement.release(first.candidate, 100)
    it.clock.now += 60
    assert it.place(4800, chain(1, 4800), session="s").decision.hit_tokens == 0


@pytest.mark.parametrize(
    "prompt", [chain(7000, 4800), [*chain(1, 3200)[:-1], 7000, *chain(8000, 1600)], chain(1, 1600)]
)
def test_a_prompt_that_does_not_begin_with_the_last_turn_has_no_hits_whatever_session_it_names(prompt):
    it = Cluster(["p0", "d0"])
    it.place(3200, chain(1, 3200), session="s")
    it.clock.now += 60.0
    placed = it.place(len(prompt) * BLOCK, prompt, session="s")
    assert placed.decision.hit_tokens == 0
    assert placed.on_decode.blocks == -(-(len(prompt) * BLOCK + 200) // BLOCK)


def test_a_turn_that_ends_after_the_next_one_began_does_not_end_that():
    it = Cluster(["p0", "d0"])
    first = it.place(1600, chain(1, 1600), session="s")
    it.place(3200, chain(1, 3200), session="s")
    it.placement.release(first.candidate, 500)
    it.clock.now += 10.0
    assert it.place(4800, chain(1, 4800), session="s").decision.hit_tokens == 3200


def test_a_prompt_that_no_worker_can_ever_hold_is_refused_and_keeps_nobody_waiting():
    it = Cluster(["p0", "d0"])
    it.report("d0", num_running=1)
    it.add(100_000)
    behind = it.add()
    refused, placed = it.pump()
    assert isinstance(refused, Refused)
    assert (refused.retry_after, refused.reason.split("; ")[0]) == (None, "the prompt has 100000 tokens")
    assert isinstance(placed, Placed)
    assert placed.candidate is behind


def test_who_has_waited_for_too_long_is_refused_wherever_he_stands():
    it = Cluster(["p0", "d0"])
    it.report("d0", num_running=500)  # no room
    head, first, last = it.add(), it.add(ttft_s=2.0), it.add(ttft_s=1.0)
    it.clock.now = 0.9
    assert it.pump() == []
    for now, late in (1.0, last), (2.0, first):
        it.clock.now = now
        (refused,) = it.pump()
        assert (refused.candidate, refused.reason) == (late, "no worker can serve the request in time")
        assert refused.retry_after >= 1
    assert it.placement.waiting() == [head]
    it.report("d0")
    (placed,) = it.pump()
    assert placed.candidate is head


def test_one_who_leaves_while_another_is_refused_for_being_late_is_not_refused_too():
    it = Cluster(["p0", "d0"])
    it.report("d0", num_running=500)
    first, second = it.add(ttft_s=1.0), it.add(ttft_s=1.0)
    it.clock.now = 2.0
    outcomes = it.placement.pump()
    assert next(outcomes).candidate is first
    it.placement.release(second)
    assert list(outcomes) == []


def test_who_stands_behind_one_that_is_late_is_placed_at_once():
    it = Cluster(["p0", "d0"], policy=RoundRobin())
    it.report("d0", num_running=383)  # the last place, but no memory for much
    late, behind = it.add(90_000, ttft_s=1.0), it.add(100)
    assert it.pump() == []
    it.clock.now = 2.0
    refused, placed = it.pump()
    assert (refused.candidate, placed.candidate) == (late, behind)


@pytest.mark.parametrize("how", ["placed", "left", "refused", "too long"])
def test_nothing_is_kept_of_the_limits_of_those_that_wait_no_more(how):
    it = Cluster(["p0", "d0"], PlacementConfig(AdmissionConfig(max_queue=1)))
    it.report("d0", num_running=0 if how == "placed" else 500)
    mine = it.add(100_000 if how == "too long" else 1600, ttft_s=60.0)
    if how == "refused":
        it.add(priority=-1)
    outcomes = it.pump()
    assert len(outcomes) == (how != "left")
    if how == "left":
        it.placement.release(mine)
    assert not it.placement._latest


def test_a_policy_that_uses_no_hits_has_no_prompt_hashed():
    class Unhashed(Prompt):
        def hashes(self, _block_size: int) -> Hashes:
            raise AssertionError("it takes time")

    it = Cluster(["p0", "d0"], policy=RoundRobin())
    it.placement.add(Unhashed(RequestFacts(1600, 200)))
    assert len(it.pump()) == 1


@pytest.mark.parametrize("session", ["", "s"])
def test_prompts_that_cannot_reuse_blocks_have_no_hits(session):
    it = Cluster(["p0", "d0"])
    prompt = chain(1, 1600)
    it.placement.apply("p0", KvEvent(stored=tuple(prompt)))
    for _ in range(2):
        candidate = Prompt(RequestFacts(1600, 1, session=session), prompt, reusable=False)
        it.placement.add(candidate)
        (placed,) = it.pump()
        assert placed.decision.hit_tokens == 0


def test_sequences_of_other_routers_count_in_what_the_pool_is_asked():
    """Work of 0.164 s comes every 2 s from this router: of ten like it, the pool would be busy for 0.82 of the time."""

    def cost(num_own: int) -> float:
        it = Cluster(["p0", "d0"])
        for number in range(60):
            it.clock.now = 2.0 * number
            placed = it.place(1600)
            it.states["p0"].counted(it.handle)
            it.states["d0"].counted(it.handle)
            if number >= num_own:
                it.placement.release(placed.candidate)
        it.report("d0", num_running=60)
        return it.place(1600).decision.cost_s

    assert cost(6) - cost(60) == pytest.approx(0.164 * (0.82 - 0.082), rel=0.05)


@pytest.mark.parametrize(("ids", "expected"), [(["d0"], (False, True)), (["p0", "d0"], (True, False))])
def test_a_prompt_is_asked_of_the_pool_that_computes_it(ids, expected):
    it = Cluster(ids)
    it.place()
    demand = it.placement._table.demand
    assert (demand.on_prefill.prompts_per_s(0.0) > 0, demand.on_decode.prompts_per_s(0.0) > 0) == expected


def test_how_long_answers_are_is_learned_from_those_that_have_ended():
    it = Cluster(["d0"])
    for num_tokens in (None, *[10] * 400):
        it.placement.release(it.place().candidate, num_tokens)
        it.states["d0"].counted(it.handle)
    assert it.placement._table.demand.mean_output == pytest.approx(10 + 246 * (127 / 128) ** 400)


def test_a_worker_that_learns_its_speed_first_says_it_of_the_others():
    it = Cluster(["d0"])
    it.attach("p0")
    it.attach("p1")
    it.place()
    it.report("p0")
    it.place()
    assert it.placement._table.prefill[Column.PREFILL_TOKEN_S] == pytest.approx([1e-4, 1e-4])


def test_what_a_decode_worker_holds_is_not_pulled():
    it = Cluster(["p0", "d0"])
    it.placement.apply("d0", KvEvent(stored=tuple(chain(1, 800))))
    assert it.place(1600, chain(1, 1600)).on_decode == Reservation(blocks=113 - 50, pull_tokens=800)


@pytest.mark.parametrize("facts", [{"tenant": "late"}, {"priority": -1}])
def test_a_full_queue_refuses_one_of_those_that_filled_it(facts):
    it = Cluster(["p0"], PlacementConfig(AdmissionConfig(max_queue=3)))
    flood = [it.add(tenant="flood") for _ in range(3)]
    assert it.pump() == []
    it.add(**facts)
    (refused,) = it.pump()
    assert isinstance(refused, Refused)
    assert refused.candidate is flood[-1]


def test_a_turn_that_ended_without_an_answer_is_not_taken_for_cached_for_ever():
    it = Cluster(["p0", "d0"])
    first = it.place(1600, chain(1, 1600), session="s")
    it.placement.release(first.candidate)
    it.clock.now += 10.0
    assert it.place(1600, chain(1, 1600), session="s").decision.hit_tokens == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_model_that_cannot_be_is_not_believed(value):
    it = Cluster(["p0", "d0"])
    for field_name in StepModel.__slots__:
        model = model_to_pb(FAST_MODEL)
        setattr(model, field_name, value)
        for worker_id in it.ids:
            it.states[worker_id].report(pb.Load(num_free_blocks=10_000, model=model))
        assert it.place().decision.cost_s > 0.0
