import asyncio
import gc
import weakref

import pytest

from engine.errors import InvalidRequest
from engine.kv.block_hash import block_hashes, chain_seed
from engine.request import FinishReason
from router.admission import AdmissionConfig
from router.flight import Slo
from router.generation import DeadlineExceeded, Overloaded
from router.policies import LeastLoaded, RoundRobin
from tests.router.dispatch.cluster import EXPECTED, PROMPT, Gate, cluster, collect, fail_once
from tests.router.dispatch.fake_worker import FakeError, expected_tokens


async def test_tokens_come_once_and_in_order_and_the_timeline_tells_where_time_went():
    async with cluster(1, 1) as it:
        stream = it.start(logprobs=0, prompt_logprobs=0)
        deltas = [delta async for delta in stream]
        assert [token for delta in deltas for token in delta.token_ids] == EXPECTED
        assert [each.token_id for delta in deltas for each in delta.logprobs] == EXPECTED
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert [each.token_id for each in stream.prompt_logprobs] == list(PROMPT[1:])
        timeline = stream.timeline
        assert (timeline.prefill_worker, timeline.decode_worker, timeline.attempts) == ("p0", "d0", 1)
        assert (timeline.queued_s, timeline.prefill_s, timeline.transfer_s) == (0.001, 0.002, 0.0005)
        assert (timeline.transfer_blocks, timeline.transport) == (3, "loopback")
        assert timeline.received <= timeline.dispatched <= timeline.first_token <= timeline.last_token
        assert it["d0"].submits[0].offer == f"p0/{it['p0'].submits[0].handle}".encode()
        await it.until_quiet()
        assert it["p0"].num_cancels == it["d0"].num_cancels == 0


async def test_the_first_token_is_streamed_while_decode_still_pulls():
    async with cluster(1, 1) as it:
        gate = it["d0"].hooks["pull"] = Gate()
        stream = it.start()
        first = await anext(stream)
        assert first.token_ids == EXPECTED[:1]
        gate.opened.set()
        assert first.token_ids + await collect(stream) == EXPECTED


async def test_decode_tokens_that_overtake_the_first_one_wait_for_it():
    async with cluster(1, 1) as it:
        gate = it["p0"].hooks["first_token"] = Gate()
        stream = it.start(max_tokens=4)
        await it.signal.until(lambda: it["d0"].submits and not it["d0"].jobs)  # decode has said everything
        assert stream.token_ids == []
        gate.opened.set()
        assert await collect(stream) == EXPECTED[:4]


async def test_one_token_needs_no_decode_worker():
    async with cluster(1, 1) as it:
        assert await collect(it.start(max_tokens=1)) == EXPECTED[:1]
        await it.until_quiet()
        assert it["d0"].submits == []


async def test_a_prefill_that_ends_with_its_first_token_cancels_decode():
    async with cluster(1, 1) as it:
        it["d0"].hooks["pull"] = Gate()
        stream = it.start(stop_token_ids=(EXPECTED[0],))
        deltas = [delta async for delta in stream]
        assert [delta.token_ids for delta in deltas] == [EXPECTED[:1]]
        assert deltas[-1].finish_reason is FinishReason.STOP
        await it.until_quiet()


async def test_a_short_prompt_goes_to_the_decode_worker_alone():
    async with cluster(1, 1) as it:
        prompt = (1, 2, 3)
        stream = it.start(prompt=prompt)
        assert await collect(stream) == expected_tokens(prompt, 12)
        assert stream.timeline.prefill_worker == ""
        assert it["p0"].submits == []


async def test_without_prefill_workers_decode_workers_serve_everything():
    async with cluster(0, 1) as it:
        assert it.dispatcher.ready
        assert await collect(it.start()) == EXPECTED


@pytest.mark.parametrize("policy", [RoundRobin(), LeastLoaded()])
async def test_every_policy_serves(policy):
    async with cluster(2, 2, policy=policy) as it:
        streams = [it.start() for _ in range(8)]
        assert [await collect(stream) for stream in streams] == [EXPECTED] * 8
        assert {len(worker.submits) for worker in it.workers.values()} == {4}


async def test_a_bad_request_is_refused_by_its_field_and_not_retried():
    async with cluster(1, 1) as it:
        it["p0"].hooks["offer"] = fail_once(FakeError("too many tokens", retryable=False, param="max_tokens"))
        stream = it.start()
        with pytest.raises(InvalidRequest) as caught:
            await collect(stream)
        assert (caught.value.param, stream.timeline.attempts) == ("max_tokens", 1)
        await it.until_quiet()


async def test_numbers_that_no_message_can_carry_are_refused_at_once():
    async with cluster(1, 1) as it:
        for bad in ({"priority": 1 << 40}, {"prompt": (1, -1)}, {"prompt": (1 << 32,) * 99}):
            with pytest.raises(InvalidRequest):
                it.start(**bad)
        assert await collect(it.start()) == EXPECTED
        await it.until_quiet()


@pytest.mark.parametrize("point", ["offer", "first_token", "pull", "token"])
async def test_closing_the_stream_cancels_on_every_worker(point):
    async with cluster(1, 1) as it:
        gate = Gate()
        it["p0" if point in ("offer", "first_token") else "d0"].hooks[point] = gate
        stream = it.start()
        await gate.reached.wait()
        await stream.aclose()
        await stream.aclose()
        await it.until_quiet()
        assert await collect(stream) == []


async def test_the_deadline_ends_a_request_wherever_it_is():
    async with cluster(1, 1) as it:
        it["d0"].hooks["token"] = Gate(index=3)
        stream = it.start(timeout=0.3)
        with pytest.raises(DeadlineExceeded):
            await collect(stream)
        assert stream.token_ids == EXPECTED[:3]
        assert 0 < it["d0"].submits[0].timeout_ms <= 300
        await it.until_quiet()


async def test_a_full_queue_refuses_and_room_serves_the_most_urgent_first():
    async with cluster(0, 1, admission=AdmissionConfig(max_queue=2, max_running=1)) as it:
        gate = it["d0"].hooks["token"] = Gate()
        running = it.start(max_tokens=1)
        late, urgent = it.start(max_tokens=1, priority=5), it.start(max_tokens=2, priority=-5)
        with pytest.raises(Overloaded) as caught:
            it.start(priority=6)
        assert caught.value.retry_after >= 1
        assert not caught.value.unavailable
        gate.opened.set()
        assert [len(await collect(each)) for each in (running, late, urgent)] == [1, 1, 2]
        assert [submit.params.max_tokens for submit in it["d0"].submits] == [1, 2, 1]
        await it.until_quiet()


async def test_a_full_queue_refuses_what_waits_for_one_that_is_more_urgent():
    async with cluster(0, 1, admission=AdmissionConfig(max_queue=1, max_running=1)) as it:
        gate = it["d0"].hooks["token"] = Gate()
        running, late = it.start(max_tokens=1), it.start(max_tokens=1, priority=5)
        urgent = it.start(max_tokens=2)
        with pytest.raises(Overloaded):
            await collect(late)
        gate.opened.set()
        assert [len(await collect(each)) for each in (running, urgent)] == [1, 2]
        await it.until_quiet()


async def test_a_request_no_decode_worker_has_room_for_waits_in_the_router():
    async with cluster(1, 1, worker_options={"num_blocks": 30}) as it:
        gate = it["d0"].hooks["token"] = Gate()
        first, second = it.start(), it.start()
        await gate.reached.wait()
        assert len(it["p0"].submits) == 1
        assert it.dispatcher.status()["queue"] == {"waiting": 1, "running": 1}
        gate.opened.set()
        assert await collect(first) == await collect(second) == EXPECTED


async def test_a_prompt_that_fits_no_worker_is_refused_at_once_though_all_are_busy():
    async with cluster(1, 1, worker_options={"num_blocks": 30, "max_model_len": len(PROMPT) + 1}) as it:
        gate = it["d0"].hooks["token"] = Gate()
        running = it.start()
        await gate.reached.wait()
        with pytest.raises(InvalidRequest) as caught:
            it.start(prompt=(*PROMPT, 1))
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        waiting = it.start()
        with pytest.raises(InvalidRequest):
            it.start(prompt=(*PROMPT, 1))
        gate.opened.set()
        assert await collect(running) == await collect(waiting) == EXPECTED
        await it.until_quiet()


async def test_frames_that_come_together_make_one_decision_for_those_who_wait(monkeypatch: pytest.MonkeyPatch):
    async with cluster(0, 2, admission=AdmissionConfig(max_running=1)) as it:
        gate = it["d0"].hooks["token"] = it["d1"].hooks["token"] = Gate()
        streams = [it.start(max_tokens=1), it.start(max_tokens=1)]
        await gate.reached.wait()
        dispatcher, pumps = it.dispatcher, 0
        pump = dispatcher._placement.pump

        def counted():
            nonlocal pumps
            pumps += 1
            return pump()

        monkeypatch.setattr(dispatcher._placement, "pump", counted)
        for _ in range(5):
            for session in dispatcher._sessions.values():
                dispatcher.session_reported(session)
        assert pumps == 0
        await asyncio.sleep(0)
        assert pumps == 1
        gate.opened.set()
        assert [len(await collect(stream)) for stream in streams] == [1, 1]


@pytest.mark.parametrize("hit", ["p0", "p1"])
async def test_a_request_goes_to_the_prefill_worker_that_holds_its_prefix(hit):
    async with cluster(2, 1) as it:
        hashes = block_hashes(PROMPT, 4, chain_seed("", "model", "", ""))
        it[hit].store(hashes[:10])
        await it.signal.until(lambda: it.known(hit)["indexed_blocks"] == 10)
        stream = it.start()
        assert await collect(stream) == EXPECTED
        assert (stream.decisions[0].prefill, stream.decisions[0].hit_tokens) == (hit, 40)
        await it.signal.until(lambda: it.known(hit)["num_waiting_tokens"] == 0)
        it[hit].hooks["offer"] = fail_once(FakeError("lost", retryable=True))
        again = it.start()
        assert await collect(again) == EXPECTED
        assert [decision.hit_tokens for decision in again.decisions] == [40, 0]
        assert it.dispatcher.counters.predicted_hit_tokens == 40  # of the first: what a retry found says nothing


async def test_closing_the_dispatcher_fails_what_runs_and_leaves_nothing_on_workers():
    async with cluster(1, 1) as it:
        gate = it["d0"].hooks["token"] = Gate()
        stream = it.start()
        await gate.reached.wait()
        await it.dispatcher.close()
        with pytest.raises(Overloaded, match="shutting down") as error:
            await collect(stream)
        assert error.value.unavailable
        await it.signal.until(lambda: not it["d0"].jobs and not it["p0"].jobs)
        with pytest.raises(Overloaded, match="shutting down"):
            it.start()


async def test_a_request_that_is_refused_leaves_no_cycle_either():
    gc.disable()
    try:
        async with cluster(1, 1, slo=Slo(ttft_s=1e-9)) as it:
            flights: list[weakref.ref[object]] = []
            release = it.dispatcher.flight_over

            def over(flight: object) -> None:
                flights.append(weakref.ref(flight))
                release(flight)

            it.dispatcher.flight_over = over
            for _ in range(3):
                with pytest.raises(Overloaded):
                    it.start()
            assert [flight() for flight in flights] == [None] * 3
    finally:
        gc.enable()


async def test_a_request_that_is_over_leaves_no_cycle_that_has_to_be_collected():
    gc.disable()
    try:
        async with cluster(1, 1) as it:
            stream = it.start()
            (flight,) = map(weakref.ref, it.dispatcher._flights)
            assert await collect(stream) == EXPECTED
            await stream.aclose()
            await it.until_quiet()
            del stream
            assert flight() is None
    finally:
        gc.enable()
