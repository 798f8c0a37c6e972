"""The metrics of processes that share a port: each writes its own to a directory, and any of them shows the sum.

The files are those of prometheus_client's multiprocess mode, whose collector adds them up. Values are kept in plain
Python, as one process keeps them, and written about once a second; so a process that is killed takes at most that
much with it, and the process that answers a scrape writes its own first. Files are written whole and then renamed:
in a mapped one, as prometheus_client's own are, a full disk would kill the process. Where they cannot be written the
sum is older, no more.
"""

import asyncio
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

log = logging.getLogger(__name__)

WRITE_S = 1.0


class SharedMetrics(Collector):
    """`process` is this one's number in `directory`: one that is started again goes on from the totals it finds."""

    def __init__(self, own: Collector, directory: Path, process: int) -> None:
        self.registry = CollectorRegistry()
        self._own = own
        self._directory = directory
        self._process = process
        self._merged = MultiProcessCollector(None, str(directory))
        self._earlier = {kind: _read(self._file(kind)) for kind in ("counter", "histogram")}
        self._failure = ""  # of the last write
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        self.write()
        yield from self._merged.collect()

    async def keep_writing(self) -> None:
        while True:
            self.write()
            await asyncio.sleep(WRITE_S)

    def write(self) -> None:
        """Where that fails it is logged, once."""
        try:
            for kind, values in self._now().items():
                file = self._file(kind)
                fresh = file.with_suffix(".new")
                fresh.write_bytes(_packed(values))
                fresh.replace(file)
            self._failure = ""
        except OSError as error:
            if self._failure != str(error):
                self._failure = str(error)
                log.warning("metrics of this process cannot be written: %s", error)

    def _now(self) -> dict[str, dict[str, float]]:
        """By kind of file, the value of each key. Gauges go, as workers do."""
        files: dict[str, dict[str, float]] = {"gauge_livesum": {}, "gauge_livemax": {}}
        files |= {kind: dict(earlier) for kind, earlier in self._earlier.items()}
        for family in self._own.collect():
            if family.type == "gauge":
                for key, labels, value in _values(family):
                    # What several routers say of one worker does not add up: the worst is shown.
                    files["gauge_livemax" if "worker_id" in labels else "gauge_livesum"][key] = value
                continue
            earlier = self._earlier[family.type]
            for key, _, value in _values(family):
                files[family.type][key] = earlier.get(key, 0.0) + value
        return files

    def _file(self, kind: str) -> Path:
        return self._directory / f"{kind}_{self._process}.db"


def _read(file: Path) -> dict[str, float]:
    if not file.exists():
        return {}
    return {key: value for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file))}


def _packed(values: Mapping[str, float]) -> bytes:
    """As MmapedDict keeps them: the size of all in an int and four bytes more, then of each the key's size in an int,
    the key, padded to where a double may begin, the value, and a time that nobody reads."""
    entries = []
    for key, value in values.items():
        name = key.encode()
        padded = name + b" " * (8 - (len(name) + 4) % 8)
        entries.append(struct.pack(f"i{len(padded)}sdd", len(name), padded, value, 0.0))
    packed = b"".join(entries)
    return struct.pack("ii", 8 + len(packed), 0) + packed


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
