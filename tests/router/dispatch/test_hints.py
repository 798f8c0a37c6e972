"""What a request says of itself besides its tokens, and what the deployment promises, up to the workers."""

import pytest

from router.admission import AdmissionConfig
from router.flight import Slo
from router.generation import Overloaded, RouteHints
from router.policies import PrefixAware
from tests.router.dispatch.cluster import EXPECTED, Gate, cluster, collect, fail_once
from tests.router.dispatch.fake_worker import FakeError


async def test_a_request_that_cannot_be_in_time_is_refused_at_once():
    async with cluster(1, 1, slo=Slo(ttft_s=1e-9)) as it:
        with pytest.raises(Overloaded) as caught:
            it.start()
        assert caught.value.retry_after >= 1
        assert not caught.value.unavailable
        assert it.dispatcher.counters.refused == 1
        await it.until_quiet()
    async with cluster(1, 1, slo=Slo(ttft_s=60.0, tpot_s=60.0)) as it:
        assert await collect(it.start()) == EXPECTED


async def test_of_what_a_request_and_the_deployment_say_of_its_time_the_stricter_counts(monkeypatch):
    limits: list[tuple[float | None, float | None]] = []
    choose = PrefixAware.choose

    def spy(policy, facts, hits, table):
        limits.append((facts.ttft_s, facts.tpot_s))
        return choose(policy, facts, hits, table)

    monkeypatch.setattr(PrefixAware, "choose", spy)
    async with cluster(1, 1, slo=Slo(ttft_s=60.0)) as it:
        for hints in (RouteHints(), RouteHints(tpot_s=7.0), RouteHints(ttft_s=30.0), RouteHints(ttft_s=90.0)):
            assert await collect(it.start(hints=hints)) == EXPECTED
        with pytest.raises(Overloaded):
            it.start(hints=RouteHints(ttft_s=1e-9))
    assert limits == [(60.0, None), (60.0, 7.0), (30.0, None), (60.0, None)]


async def test_a_request_that_waits_is_refused_when_it_cannot_be_in_time_any_more():
    async with cluster(1, 1, slo=Slo(ttft_s=0.3), admission=AdmissionConfig(max_running=1)) as it:
        gate = it["d0"].hooks["token"] = Gate()
        first, second = it.start(), it.start()
        await gate.reached.wait()
        await it.signal.until(lambda: it.dispatcher._clock() > second.timeline.received + 0.3)
        gate.opened.set()
        assert await collect(first) == EXPECTED
        with pytest.raises(Overloaded):
            await collect(second)
        await it.until_quiet()


async def test_a_request_that_has_begun_is_tried_again_even_if_it_is_late():
    async with cluster(1, 1, slo=Slo(ttft_s=0.2)) as it:
        gate = it["p0"].hooks["offer"] = Gate()
        stream = it.start()
        await gate.reached.wait()
        await it.signal.until(lambda: it.dispatcher._clock() > stream.timeline.received + 0.2)
        it["p0"].hooks["first_token"] = fail_once(FakeError("lost", retryable=True))
        gate.opened.set()
        assert await collect(stream) == EXPECTED
        assert stream.timeline.attempts == 2


async def test_turns_of_a_session_stay_together():
    async with cluster(3, 3) as it:
        stream = it.start(hints=RouteHints(session="s"))
        answer = await collect(stream)
        for _ in range(4):
            await collect(it.start())
        turn = (*range(100, 180), *answer)
        again = it.start(prompt=(*turn, *range(100)), hints=RouteHints(session="s"))
        await collect(again)
        assert again.timeline.prefill_worker == stream.timeline.prefill_worker
        assert again.timeline.decode_worker == stream.timeline.decode_worker
        assert again.decisions[0].hit_tokens == 80
        short = it.start(prompt=(*turn, 1, 2, 3), hints=RouteHints(session="another"))
        await collect(short)
        assert short.decisions[0].hit_tokens == 0


async def test_tenants_take_turns():
    async with cluster(0, 1, admission=AdmissionConfig(max_running=1)) as it:
        gate = it["d0"].hooks["token"] = Gate()
        running = it.start(max_tokens=1)
        large = tuple(range(6000))
        flood = [it.start(prompt=large, max_tokens=2, hints=RouteHints(tenant="a")) for _ in range(6)]
        late = it.start(max_tokens=3, hints=RouteHints(tenant="b"))
        gate.opened.set()
        for stream in (running, *flood, late):
            await collect(stream)
        order = [submit.params.max_tokens for submit in it["d0"].submits]
        assert order.index(3) <= 3
        assert sorted(order) == [1, 2, 2, 2, 2, 2, 2, 3]
