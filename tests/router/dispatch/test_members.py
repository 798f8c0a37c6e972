import asyncio
import random

import numpy as np
import pytest

from engine.message_stream import connect
from router import session
from router.generation import Overloaded
from router.membership import Joined, Left
from tests.router.dispatch.cluster import EXPECTED, Gate, cluster, collect
from tests.router.dispatch.fake_worker import FakeWorker, serving


async def test_with_no_decode_worker_at_all_requests_are_told_after_a_while():
    async with cluster(1, 0, no_worker_wait_s=0.1) as it:
        assert not it.dispatcher.ready
        with pytest.raises(Overloaded) as caught:
            await collect(it.start())
        assert caught.value.unavailable
        await it.until_quiet()


async def test_a_worker_that_joins_is_used_and_one_that_leaves_is_forgotten_after_its_last_request():
    async with cluster(0, 2) as it:
        it.membership.changes.put_nowait(Left("d1"))
        await it.signal.until(lambda: it.known("d1") is None)
        gate = it["d0"].hooks["token"] = Gate(index=5)
        stream = it.start()
        await gate.reached.wait()
        it.membership.changes.put_nowait(Left("d0"))
        await it.signal.until(lambda: not it.dispatcher.ready)
        waiting = it.start()
        gate.opened.set()
        assert await collect(stream) == EXPECTED
        await it.signal.until(lambda: it.known("d0") is None)
        await it["d1"].kill()
        it.membership.changes.put_nowait(await it["d1"].start())
        assert await collect(waiting) == EXPECTED
        assert waiting.timeline.decode_worker == "d1"


async def test_another_life_of_a_worker_replaces_the_session_and_its_requests_move():
    async with cluster(0, 2) as it:
        gate = it["d0"].hooks["token"] = it["d1"].hooks["token"] = Gate(index=5)
        stream = it.start()
        await gate.reached.wait()
        reborn = it[stream.timeline.decode_worker]
        reborn.epoch += 1
        it.membership.changes.put_nowait(Joined(reborn.id, reborn.role, reborn.address, reborn.epoch))
        gate.opened.set()
        assert await collect(stream) == EXPECTED
        await it.signal.until(lambda: reborn.num_sessions == 2)
        await it.until_usable("d0", "d1")
        await it.until_quiet()


async def test_a_worker_that_is_not_what_the_membership_says_is_not_used():
    async with cluster(0, 1) as it:
        impostor = Joined("p9", "prefill", it["d0"].address, 1)
        it.membership.changes.put_nowait(impostor)
        await it.signal.until(lambda: it["d0"].num_sessions >= 3)  # refused, tried again
        assert not it.known("p9")["attached"]
        assert await collect(it.start()) == EXPECTED


async def test_engines_that_differ_are_never_paired():
    async with cluster(1, 1) as it:
        stranger = FakeWorker("p1", "prefill", it.signal, token="secret", fingerprint="other")
        async with serving(stranger) as members:
            it.membership.changes.put_nowait(members[0])
            await it.until_usable("p1")
            streams = [it.start() for _ in range(6)]
            assert [await collect(stream) for stream in streams] == [EXPECTED] * 6
            assert stranger.submits == []


async def test_a_draining_worker_finishes_and_gets_nothing_new():
    async with cluster(0, 2) as it:
        gate = it["d0"].hooks["token"] = it["d1"].hooks["token"] = Gate(index=5)
        stream = it.start()
        await gate.reached.wait()
        drained = stream.timeline.decode_worker
        it[drained].draining = True
        await it.signal.until(lambda: not it.usable(drained))
        others = [it.start() for _ in range(3)]
        gate.opened.set()
        assert [await collect(each) for each in (stream, *others)] == [EXPECTED] * 4
        assert len(it[drained].submits) == 1


async def test_after_a_missing_frame_the_index_is_exact_again():
    async with cluster(1, 1) as it:
        it["p0"].store([1, 2, 3])
        await it.signal.until(lambda: it.known("p0")["indexed_blocks"] == 3)
        it["p0"].skip_frame()
        it["p0"].store([4])
        await it.signal.until(lambda: it["p0"].num_sessions == 2 and it.usable("p0"))
        assert it.known("p0")["indexed_blocks"] == 4
        assert it.dispatcher.counters.sessions_lost == 1


async def test_a_cleared_cache_is_forgotten_and_what_came_after_is_known():
    async with cluster(1, 1) as it:
        it["p0"].store([1, 2, 3])
        await it.signal.until(lambda: it.known("p0")["indexed_blocks"] == 3)
        it["p0"].clear([4])
        await it.signal.until(lambda: it.known("p0")["indexed_blocks"] == 1)
        it["p0"].store([5])
        await it.signal.until(lambda: it.known("p0")["indexed_blocks"] == 2)
        assert it.dispatcher.counters.sessions_lost == 0


async def test_a_missing_kv_event_makes_the_session_start_over():
    async with cluster(1, 1) as it:
        it["p0"].store([1])
        it["p0"].lose_event()
        it["p0"].store([2])
        await it.signal.until(lambda: it["p0"].num_sessions == 2 and it.usable("p0"))
        assert it.known("p0")["indexed_blocks"] == 2


async def test_a_worker_with_another_token_is_not_used():
    async with cluster(0, 1) as it:
        stranger = FakeWorker("d9", "decode", it.signal, token="another")
        async with serving(stranger) as members:
            it.membership.changes.put_nowait(members[0])
            await it.signal.until(lambda: it.known("d9") is not None)
            assert await collect(it.start()) == EXPECTED
            assert stranger.num_sessions == 0
            it.membership.changes.put_nowait(Left("d9"))
            await it.signal.until(lambda: it.known("d9") is None)


async def test_a_worker_that_leaves_while_it_is_being_connected_to_is_left(monkeypatch):
    connecting, go_on = asyncio.Event(), asyncio.Event()

    async def slow_connect(*args):
        connecting.set()
        await go_on.wait()
        return await connect(*args)

    async with cluster(0, 1) as it, serving(FakeWorker("d9", "decode", it.signal)) as members:
        monkeypatch.setattr(session, "connect", slow_connect)
        it.membership.changes.put_nowait(members[0])
        await connecting.wait()
        it.membership.changes.put_nowait(Left("d9"))
        await it.signal.until(lambda: it.dispatcher._sessions["d9"].retired)
        go_on.set()
        await it.signal.until(lambda: it.known("d9") is None)
        assert await collect(it.start()) == EXPECTED


@pytest.mark.parametrize("seed", range(3))
async def test_the_index_holds_what_workers_hold_whatever_frames_and_events_are_lost(seed):
    rng = random.Random(seed)
    async with cluster(2, 2) as it:
        index, slots = it.dispatcher._placement._index, it.dispatcher._placement._slots

        def exact(worker: FakeWorker) -> bool:
            known, slot = set(), slots[worker.id]
            for block in (*range(50), 99):
                found = np.zeros(index.num_slots)
                index.find([block], found)
                if found[slot]:
                    known.add(block)
            return known == set(worker.hashes) and index.num_blocks(slot) == len(known)

        for _ in range(60):
            worker = it[rng.choice(list(it.workers))]
            match rng.choice(("store", "store", "clear", "frame", "event", "kill")):
                case "store":
                    worker.store([rng.randrange(50) for _ in range(rng.randrange(4))])
                case "clear":
                    worker.clear([rng.randrange(50) for _ in range(rng.randrange(4))])
                case "frame":
                    worker.skip_frame()
                case "event":
                    worker.lose_event()
                case "kill":
                    await worker.kill()
                    await it.signal.until(lambda worker=worker: not it.usable(worker.id))
                    await worker.start()
            if rng.random() < 0.3:
                await asyncio.sleep(0.01)
        for worker in it.workers.values():
            worker.store([99])  # after it nothing is missing that a session does not know of
            await it.signal.until(lambda worker=worker: it.usable(worker.id) and exact(worker))
        assert it.dispatcher.counters.sessions_lost > 5
