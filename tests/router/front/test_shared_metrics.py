import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.registry import Collector

from router.metrics import Metrics
from router.shared_metrics import SharedMetrics

MODEL = {"model_name": "m"}


def process(directory: Path, number: int) -> tuple[Metrics, SharedMetrics]:
    own = Metrics("m")
    return own, SharedMetrics(own, directory, number)


def sample_values(metrics: Collector) -> Callable[..., float | None]:
    registry = CollectorRegistry()
    registry.register(metrics)
    return registry.get_sample_value


def test_one_process_shows_what_it_would_show_alone(tmp_path: Path) -> None:
    own, shared = process(tmp_path, 0)
    own.responses["/live", 200] = 3
    own.generation_tokens = 8
    own.num_running = 2
    for seconds in (0.0005, 0.03, 0.03, 9.0, 5000.0):
        own.first_token.observe(seconds)
    own.inter_token.observe(0.02)
    assert _samples(shared.snapshot()) == _samples(own.snapshot())
    own.first_token.observe(0.03)
    assert _samples(shared.snapshot()) == _samples(own.snapshot())


def test_any_process_shows_the_sum_and_a_new_life_goes_on_from_it(tmp_path: Path) -> None:
    (first, shown), (second, other) = process(tmp_path, 0), process(tmp_path, 1)
    for own, count in ((first, 2), (second, 5)):
        own.responses["/live", 200] = count
        own.num_waiting = count
        for _ in range(count):
            own.first_token.observe(0.03)
    other.write()
    seen = sample_values(shown)
    for _ in range(2):  # a scrape counts nothing twice
        assert seen("baton_http_responses_total", {"route": "/live", "status": "200"}) == 7
        assert seen("vllm:num_requests_waiting", MODEL) == 7
        assert seen("baton_time_to_first_token_seconds_count", MODEL) == 7
        assert seen("baton_time_to_first_token_seconds_bucket", MODEL | {"le": "0.02"}) == 0
        assert seen("baton_time_to_first_token_seconds_bucket", MODEL | {"le": "0.04"}) == 7
    mark_process_dead(1, str(tmp_path))
    assert seen("vllm:num_requests_waiting", MODEL) == 2
    assert seen("baton_time_to_first_token_seconds_count", MODEL) == 7
    again, other = process(tmp_path, 1)
    again.responses["/live", 200] = 1
    again.first_token.observe(0.03)
    other.write()
    assert seen("baton_http_responses_total", {"route": "/live", "status": "200"}) == 8
    assert seen("baton_time_to_first_token_seconds_count", MODEL) == 8
    assert len(list(tmp_path.glob("*.db"))) == 2 * 4


def test_counts_never_fall_where_threads_write_in_another_order(tmp_path: Path) -> None:
    own, shared = process(tmp_path, 0)
    own.generation_tokens = 1
    earlier = shared.snapshot()
    own.generation_tokens = 2
    later = shared.snapshot()
    alone = own.snapshot()
    own.generation_tokens = 3  # snapshots do not see it
    name = "baton_generation_tokens_total"
    assert _samples(alone)[name, (("model_name", "m"),)] == 2.0
    for snapshot in (later, earlier, later):
        assert {value for (each, _), value in _samples(snapshot).items() if each == name} == {2.0}


def test_threads_write_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shared = process(tmp_path, 0)
    inside, others = threading.Event(), threading.Event()
    write_files = SharedMetrics._write_files

    def slowly(self: SharedMetrics, files: Mapping[str, Mapping[str, float]]) -> None:
        if not inside.is_set():
            inside.set()
            assert not others.wait(0.2), "two threads write the same files at once"
        else:
            others.set()
        write_files(self, files)

    monkeypatch.setattr(SharedMetrics, "_write_files", slowly)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(shared.write)
        assert inside.wait(20)
        threads.submit(shared.write).result()
        first.result()


async def test_what_a_process_shows_to_others_is_written_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.shared_metrics.WRITE_S", 0.01)
    (own, shared), (_, other) = process(tmp_path, 0), process(tmp_path, 1)
    writing = asyncio.create_task(shared.keep_writing())
    for count in (1, 2, 3):
        own.generation_tokens = count
        async with asyncio.timeout(20):
            while sample_values(other)("baton_generation_tokens_total", MODEL) != count:  # noqa: ASYNC110 - files
                await asyncio.sleep(0.01)
    writing.cancel()


def test_of_a_worker_the_worst_is_shown_until_it_leaves(tmp_path: Path) -> None:
    class Lags(Collector):
        def __init__(self, **lags: float) -> None:
            self.lags = lags

        def collect(self):
            family = GaugeMetricFamily("lag", "Lag.", labels=["worker_id"])
            for worker_id, lag in self.lags.items():
                family.add_metric([worker_id], lag)
            yield family

    near, far = Lags(a=1.0, b=2.0), Lags(a=3.0, b=0.5)
    shown, other = SharedMetrics(near, tmp_path, 0), SharedMetrics(far, tmp_path, 1)
    other.write()
    seen = sample_values(shown)
    assert [seen("lag", {"worker_id": each}) for each in "ab"] == [3.0, 2.0]
    near.lags, far.lags = {"a": 1.0}, {"a": 0.5}
    other.write()
    assert [seen("lag", {"worker_id": each}) for each in "ab"] == [1.0, None]


def test_a_directory_that_is_gone_for_a_while_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, away = tmp_path / "metrics", tmp_path / "away"
    directory.mkdir()
    own, shared = process(directory, 0)
    own.num_running = 1
    shared.write()
    directory.rename(away)
    own.num_running = 2
    for _ in range(3):
        assert list(shared.snapshot().collect()) == []
    (warning,) = caplog.messages
    assert "cannot be written" in warning
    away.rename(directory)
    assert sample_values(shared)("vllm:num_requests_running", MODEL) == 2


def _samples(metrics: Collector) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    assert generate_latest(metrics)
    return {
        (sample.name, tuple(sorted(_label(name, value) for name, value in sample.labels.items()))): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }


def _label(name: str, value: str) -> tuple[str, str]:
    return name, str(float(value)) if name == "le" else value
