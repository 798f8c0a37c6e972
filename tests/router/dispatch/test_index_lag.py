import random

import pytest
from prometheus_client import CollectorRegistry

from router.index_lag import WINDOW_S, IndexLag
from router.metrics import Metrics
from tests.router.dispatch.cluster import cluster


@pytest.mark.parametrize("skew", [-1e6, 0.0, 1e6])
def test_clocks_that_differ_and_drift_do_not_show(skew: float) -> None:
    rng, lag, now = random.Random(0), IndexLag(), 50.0
    seen = []
    for _ in range(4000):
        now += 0.5
        worker = now * (1 + 50e-6) + skew  # 50 parts in a million fast
        age, travel = rng.random() * 2, 0.001 + rng.random() * 0.2
        lag.frame_came(worker, now + travel)
        seen.append(lag.applied(worker - age, now + travel) - (age + travel - 0.001))
    settled = seen[100:]
    drift = 2 * WINDOW_S * 50e-6
    assert -drift - 0.02 < min(settled)
    assert max(settled) < drift + 0.01


def test_the_fastest_frame_is_forgotten_after_two_windows() -> None:
    lag = IndexLag()
    lag.frame_came(sent=0.0, now=1.0)
    lag.frame_came(sent=5.0, now=8.0)
    assert lag.applied(5.0, 8.0) == lag.last_s == 2.0
    lag.frame_came(sent=38.0, now=41.0)
    assert lag.applied(38.0, 41.0) == 2.0
    lag.frame_came(sent=77.0, now=80.0)
    assert lag.applied(77.0, 80.0) == 0.0


async def test_lag_and_missing_blocks_of_each_worker_are_shown() -> None:
    async with cluster(1, 1) as it:
        registry = CollectorRegistry()
        registry.register(Metrics("m", it.dispatcher))
        seen = registry.get_sample_value
        await it.until_usable("p0", "d0")
        it["p0"].store([1, 2, 3], age_s=0.3)
        await it.signal.until(lambda: it.known("p0")["indexed_blocks"] == 3)
        assert 0.3 <= it.known("p0")["index_lag_s"] < 3
        assert it.known("d0")["index_lag_s"] == 0
        assert seen("baton_worker_index_lag_seconds", {"worker_id": "p0"}) == pytest.approx(
            it.known("p0")["index_lag_s"], abs=1e-6
        )
        assert seen("baton_index_lag_seconds_count", {"model_name": "m"}) == 1
        assert seen("baton_index_lag_seconds_bucket", {"model_name": "m", "le": "0.25"}) == 0
        assert seen("baton_worker_index_blocks_behind", {"worker_id": "p0"}) == 0
        it["p0"].hashes += [4, 5]  # the worker holds what no event tells of
        await it.signal.until(lambda: seen("baton_worker_index_blocks_behind", {"worker_id": "p0"}) == 2)
        assert seen("baton_worker_index_blocks_behind", {"worker_id": "d0"}) == 0
        it["p0"].hashes.clear()  # nor that it holds less: above 0, too, or another process's 0 would hide it
        await it.signal.until(lambda: seen("baton_worker_index_blocks_behind", {"worker_id": "p0"}) == 3)
        await it["p0"].kill()
        await it.signal.until(lambda: not it.known("p0")["attached"])
        assert seen("baton_worker_index_lag_seconds", {"worker_id": "p0"}) is None
