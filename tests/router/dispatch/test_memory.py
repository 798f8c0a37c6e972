"""Resident memory of all that decides, the prefix index included, while workers and requests come and go."""

import ctypes
import random
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean

import psutil

from engine.kv.events import KvEvent
from router import affinity
from router.admission import AdmissionConfig
from router.placement import Placed, PlacementConfig
from tests.router.dispatch.workers import BLOCK, Cluster, Prompt

NUM_LIVES = 3000
NUM_WORKERS = 32  # at a time
NUM_BLOCKS = 60  # of a worker's own at its attachment, as many that it stores later, and of the prefix that all share
NUM_RUNNING = 40
PR_SET_THP_DISABLE = 41


def soak() -> "array[int]":
    """Resident bytes after each life of a worker. No worker, session, tenant or block of its own comes twice."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # else memory may come in steps of 2 MiB
    affinity._MAX_SESSIONS = 512  # reached soon
    it = Cluster([], PlacementConfig(AdmissionConfig(max_queue=16, max_running=NUM_RUNNING)))
    rng, process = random.Random(0), psutil.Process()
    prefix, running = hashes(rng), deque[Placed[Prompt]]()
    resident = array("q", bytes(8 * NUM_LIVES))  # at once, not to grow itself
    for life in range(NUM_LIVES):
        it.clock.now = float(life)
        worker_id, own = f"{'pd'[life % 2]}{life}", hashes(rng)
        it.attach(worker_id, own)
        it.placement.apply(worker_id, KvEvent(removed=tuple(own[:29:-1]), stored=(*prefix, *hashes(rng))))
        if len(it.states) > NUM_WORKERS:
            it.placement.detach(oldest := next(iter(it.states)))
            del it.states[oldest]
        for other in rng.choices(list(it.states), k=2):  # holds so much of the prefix from now on
            it.report(other, num_running=rng.randrange(8))
            length, cleared = rng.randrange(NUM_BLOCKS), not rng.randrange(20)
            it.placement.apply(other, KvEvent(tuple(prefix[length:][::-1]), tuple(prefix[:length]), cleared))
            it.placement.reported()
        for number in range(2):  # requests, of which some wait and some are refused
            name = f"{life}-{number}".rjust(200)
            prompt = prefix[: rng.randrange(NUM_BLOCKS)] + hashes(rng)
            it.add(len(prompt) * BLOCK, prompt, priority=number, tenant=name, session=name)
        running += [outcome for outcome in it.pump() if isinstance(outcome, Placed)]
        while len(running) > NUM_RUNNING - 2:
            ended = running.popleft()
            if rng.randrange(4):
                it.placement.release(ended.candidate, rng.choice((None, 100)))
            else:
                it.placement.put_back(ended.candidate)
        resident[life] = process.memory_info().rss
    assert it.handle > NUM_LIVES, "requests have not been placed"
    return resident


def hashes(rng: random.Random) -> list[int]:
    return [rng.getrandbits(64) for _ in range(NUM_BLOCKS)]


def test_resident_memory_is_flat_over_thousands_of_lives_of_workers() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # no freed memory of other tests that a leak could fill
        resident = fresh.submit(soak).result()
    early, late = fmean(resident[NUM_LIVES // 6 : NUM_LIVES // 3]), fmean(resident[-NUM_LIVES // 3 :])
    assert late - early < 1 << 19
