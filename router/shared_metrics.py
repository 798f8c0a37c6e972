"""The metrics of processes that share a port: each writes its own to a directory, and any of them shows the sum.

The files are those of prometheus_client's multiprocess mode, whose collector adds them up. Values are kept in plain
Python, as one process keeps them, and written about once a second; so a process that is killed takes at most that
much with it, and the process that answers a scrape writes its own first.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

WRITE_S = 1.0


class SharedMetrics(Collector):
    """`process` is this one's number in `directory`: one that is started again goes on from the totals it finds."""

    def __init__(self, own: Collector, directory: Path, process: int) -> None:
        self.registry = CollectorRegistry()
        self._own = own
        self._directory = directory
        self._process = process
        self._merged = MultiProcessCollector(None, str(directory))
        self._totals = {kind: MmapedDict(str(self._file(kind))) for kind in ("counter", "histogram")}
        self._earlier = {
            kind: {key: value for key, value, _ in totals.read_all_values()} for kind, totals in self._totals.items()
        }
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        self.write()
        yield from self._merged.collect()

    async def keep_writing(self) -> None:
        while True:
            self.write()
            await asyncio.sleep(WRITE_S)

    def write(self) -> None:
        gauges: dict[str, dict[str, float]] = {"livesum": {}, "livemax": {}}
        for family in self._own.collect():
            if family.type == "gauge":
                for key, labels, value in _values(family):
                    # What several routers say of one worker does not add up: the worst is shown.
                    gauges["livemax" if "worker_id" in labels else "livesum"][key] = value
                continue
            totals, earlier = self._totals[family.type], self._earlier[family.type]
            for key, _, value in _values(family):
                totals.write_value(key, earlier.get(key, 0.0) + value, 0.0)
        for mode, values in gauges.items():
            self._replace(f"gauge_{mode}", values)

    def _file(self, kind: str) -> Path:
        return self._directory / f"{kind}_{self._process}.db"

    def _replace(self, kind: str, values: dict[str, float]) -> None:
        """Anew each time: gauges go, as workers do."""
        path = self._file(kind)
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        file = MmapedDict(str(fresh))
        for key, value in values.items():
            file.write_value(key, value, 0.0)
        file.close()
        fresh.replace(path)


def _values(family: Metric) -> Iterator[tuple[str, dict[str, str], float]]:
    """Key in a file, labels and value of each sample. Buckets in files lack what is in the smaller ones."""
    below = 0.0
    for sample in family.samples:
        value = sample.value
        if sample.name.endswith("_bucket"):
            value, below = value - below, 0.0 if sample.labels["le"] == "+Inf" else value
        elif family.type == "histogram" and sample.name.endswith("_count"):
            continue  # the collector counts what is in the buckets
        key = mmap_key(
            family.name, sample.name, list(sample.labels), list(sample.labels.values()), family.documentation
        )
        yield key, sample.labels, value
