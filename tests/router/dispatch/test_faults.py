import asyncio
import random

import pytest

from engine.kv.block_hash import bytes_to_tokens
from router.generation import GenerationFailed
from tests.router.dispatch.cluster import EXPECTED, PROMPT, Gate, cluster, collect, fail_once
from tests.router.dispatch.fake_worker import FakeError, Job, expected_tokens


@pytest.mark.parametrize("point", ["offer", "first_token", "prefilled"])
async def test_a_prefill_worker_that_dies_costs_no_token(point):
    async with cluster(2, 2) as it:
        gates = {each: Gate() for each in ("p0", "p1")}
        pulls = {each: Gate() for each in ("d0", "d1")}
        for each, gate in gates.items():
            it[each].hooks[point] = gate
        for each, gate in pulls.items():
            it[each].hooks["pull"] = gate  # the dying worker is still needed
        stream = it.start()
        await it.signal.until(lambda: any(gate.reached.is_set() for gate in gates.values()))
        victim = stream.timeline.prefill_worker
        if point == "prefilled":
            assert (await anext(stream)).token_ids == EXPECTED[:1]
        for each in gates:
            if each != victim:
                del it[each].hooks[point]
        await it[victim].kill()
        await it.signal.until(lambda: stream.timeline.attempts == 2)
        for gate in pulls.values():
            gate.opened.set()
        received = EXPECTED[:1] if point == "prefilled" else []
        assert received + await collect(stream) == EXPECTED
        assert stream.timeline.prefill_worker != victim
        await it.until_quiet()


async def test_a_prefill_worker_that_freezes_costs_no_token():
    async with cluster(2, 1, silence_s=0.3) as it:
        gates = {each: Gate() for each in ("p0", "p1")}
        for each, gate in gates.items():
            it[each].hooks["first_token"] = gate
        stream = it.start()
        await it.signal.until(lambda: any(gate.reached.is_set() for gate in gates.values()))
        victim = stream.timeline.prefill_worker
        it[victim].freeze()
        for gate in gates.values():
            gate.opened.set()
        assert await collect(stream) == EXPECTED
        assert stream.timeline.attempts == 2
        it[victim].thaw()
        await it.until_usable(victim)
        await it.until_quiet()


async def test_a_prefill_worker_may_die_after_the_handoff():
    async with cluster(1, 1) as it:
        gate = it["d0"].hooks["token"] = Gate(index=5)
        stream = it.start()
        await gate.reached.wait()
        await it.signal.until(lambda: it.known("p0")["requests"] == 0)
        await it["p0"].kill()
        await it.signal.until(lambda: not it.usable("p0"))
        gate.opened.set()
        assert await collect(stream) == EXPECTED
        assert stream.timeline.attempts == 1


@pytest.mark.parametrize("point", ["pull", "token"])
@pytest.mark.parametrize("fault", ["kill", "freeze", "gap", "garbled"])
async def test_a_decode_worker_that_fails_costs_no_token(point, fault):
    async with cluster(2, 2, silence_s=0.3) as it:
        gates = {each: Gate(index=5 if point == "token" else None) for each in ("d0", "d1")}
        for each, gate in gates.items():
            it[each].hooks[point] = gate
        stream = it.start(logprobs=0)
        await it.signal.until(lambda: any(gate.reached.is_set() for gate in gates.values()))
        victim = stream.timeline.decode_worker
        for each in gates:
            if each != victim:
                del it[each].hooks[point]
        if fault == "kill":
            await it[victim].kill()
        elif fault == "freeze":
            it[victim].freeze()
        elif fault == "gap":
            it[victim].skip_frame()
        else:
            it[victim].garble()
        deltas = [delta async for delta in stream]
        assert [token for delta in deltas for token in delta.token_ids] == EXPECTED
        assert [each.token_id for delta in deltas for each in delta.logprobs] == EXPECTED
        assert stream.timeline.attempts == 2
        gates[victim].opened.set()
        it[victim].thaw()
        await it.until_quiet()


async def test_the_only_worker_that_dies_is_used_again_when_it_is_back():
    async with cluster(1, 1) as it:
        it["d0"].hooks["token"] = Gate(index=5)
        stream = it.start()
        await it.signal.until(lambda: len(stream.token_ids) == 5)
        await it["d0"].kill()
        await it.signal.until(lambda: not it.dispatcher.ready)
        del it["d0"].hooks["token"]
        await it["d0"].start()
        assert await collect(stream) == EXPECTED
        last = it["d0"].submits[-1]
        assert bytes_to_tokens(last.token_ids) == (*PROMPT, *EXPECTED[:5])
        assert (last.num_prompt_tokens, last.seed) == (len(PROMPT), 7)


async def test_a_worker_without_progress_is_lost_and_not_used_until_it_moves():
    async with cluster(1, 2, stall_s=0.2) as it:
        stuck = {each: Gate(index=5) for each in ("d0", "d1")}
        for each, gate in stuck.items():
            it[each].hooks["token"] = gate
        stream = it.start()
        await it.signal.until(lambda: any(gate.reached.is_set() for gate in stuck.values()))
        victim = stream.timeline.decode_worker
        other = "d1" if victim == "d0" else "d0"
        del it[other].hooks["token"]
        it[victim].progress = 1_000_000
        assert await collect(stream) == EXPECTED
        assert stream.timeline.decode_worker == other
        it[victim].progress = None
        await it.until_usable(victim)


async def test_a_failed_pull_avoids_both_of_its_workers():
    async with cluster(2, 2) as it:
        for each in ("d0", "d1"):
            it[each].hooks["pull"] = fail_once(FakeError("pull failed", retryable=True))
        stream = it.start()
        assert await collect(stream) == EXPECTED
        first, second = stream.decisions[:2]
        assert first.prefill != second.prefill
        assert first.decode != second.decode
        await it.until_quiet()


async def test_with_no_other_prefill_worker_a_failed_pull_ends_in_a_local_prefill():
    async with cluster(1, 1) as it:
        it["d0"].hooks["pull"] = fail_once(FakeError("pull failed", retryable=True))
        stream = it.start()
        assert await collect(stream) == EXPECTED
        assert stream.timeline.prefill_worker == ""


async def test_attempts_are_bounded_and_come_ever_more_seldom(monkeypatch):
    loop, delays = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def at_once(delay, call, *args):
        if call.__name__ != "_wait":
            return call_later(delay, call, *args)
        delays.append(delay)
        return call_later(0.0, call, *args)

    async def refuse(_job: Job) -> None:
        raise FakeError("no", retryable=True)

    async with cluster(1, 1) as it:
        monkeypatch.setattr(loop, "call_later", at_once)
        it["p0"].hooks["offer"] = it["d0"].hooks["token"] = refuse
        stream = it.start()
        with pytest.raises(GenerationFailed):
            await collect(stream)
        assert stream.timeline.attempts == 8
        assert delays == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
        await it.until_quiet()


@pytest.mark.parametrize("seed", range(2))
async def test_random_faults_never_change_a_stream(seed):
    rng = random.Random(seed)

    async def trouble(_job: Job) -> None:
        if rng.random() < 0.01:
            raise FakeError("chance", retryable=True)

    async with cluster(2, 3, silence_s=0.4, max_fruitless=50) as it:  # more than chance can bring
        for worker in it.workers.values():
            worker.hooks |= {point: trouble for point in ("offer", "first_token", "pull", "token")}

        async def client(number: int) -> None:
            prompt = tuple(rng.randrange(1000) for _ in range(rng.choice((3, 20, 100))))
            max_tokens = rng.choice((1, 2, 7, 40))
            stream = it.start(prompt=prompt, max_tokens=max_tokens)
            if number % 10 == 0:
                await anext(stream)
                await stream.aclose()
            else:
                assert await collect(stream) == expected_tokens(prompt, max_tokens)

        async def hurt() -> None:
            victim = it[rng.choice(list(it.workers))]
            fault = rng.choice(("kill", "freeze", "gap"))
            if fault == "kill":
                await victim.kill()
                await it.signal.until(lambda: not it.usable(victim.id))
                await victim.start()
            elif fault == "freeze":
                victim.freeze()
                await it.signal.until(lambda: not it.usable(victim.id))
                victim.thaw()
            else:
                victim.skip_frame()
            await it.until_usable(*it.workers)

        async def saboteur() -> None:
            while True:
                await hurt()

        sabotage = asyncio.create_task(saboteur())
        try:
            wave = 0
            while wave < 10 or it.dispatcher.counters.sessions_lost < 5:
                async with asyncio.TaskGroup() as clients:
                    for number in range(10):
                        clients.create_task(client(wave * 10 + number))
                wave += 1
        finally:
            sabotage.cancel()
            await asyncio.wait({sabotage})
        counters = it.dispatcher.counters
        assert counters.sessions_lost >= 5
        assert counters.attempts > counters.requests
        for worker in it.workers.values():
            worker.thaw()
        await it.until_quiet()
