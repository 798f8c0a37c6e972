"""The metrics of processes that share a port: each writes its own to a directory, and any of them shows the sum.

The files are those of prometheus_client's multiprocess mode, whose collector adds them up. Values are kept in plain
Python, as one process keeps them, and written about once a second; so a process that is killed takes at most that
much with it, and the process that answers a scrape writes its own first. Files are written whole and then renamed:
in a mapped one, as prometheus_client's own are, a full disk would kill the process. Where they cannot be written the
sum is older, no more. Values are taken on the event loop, where they change; files are written and read in threads.
"""

import asyncio
import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

WRITE_S = 1.0
MAX_KEYS = 20_000  # that are kept; of a thousand workers there are 3,000


class SharedMetrics(Collector):
    """`process` is this one's number in `directory`: one that is started again goes on from the totals it finds."""

    def __init__(self, own: Collector, directory: Path, process: int) -> None:
        self._own = own
        self._directory = directory
        self._process = process
        self._merged = MultiProcessCollector(None, str(directory))
        self._earlier = {kind: _read(self._file(kind)) for kind in ("counter", "histogram")}
        self._failure = ""  # of the last write
        self._num_taken = self._num_written = 0
        self._writing = Lock()

    def snapshot(self) -> Collector:
        """All of now, to be collected in any thread."""
        write = self._write_now()
        return _Later(write, self._merged)

    def collect(self) -> Iterator[Metric]:
        yield from self.snapshot().collect()

    async def keep_writing(self) -> None:
        while True:
            await asyncio.to_thread(self._write_now())
            await asyncio.sleep(WRITE_S)

    def write(self) -> None:
        self._write_now()()

    def _write_now(self) -> Callable[[], None]:
        """Writes what there is now. Where that fails it is logged, once."""
        self._num_taken += 1
        return partial(self._write, self._num_taken, self._now())

    def _write(self, number: int, files: Mapping[str, Mapping[str, float]]) -> None:
        with self._writing:
            if number > self._num_written:  # else counts would fall
                self._num_written = number
                self._write_files(files)

    def _write_files(self, files: Mapping[str, Mapping[str, float]]) -> None:
        try:
            for kind, values in files.items():
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


@dataclass(frozen=True, slots=True)
class _Later(Collector):
    write: Callable[[], None]
    merged: Collector

    def collect(self) -> Iterator[Metric]:
        self.write()
        yield from self.merged.collect()


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


@lru_cache(MAX_KEYS)
def _key(family: str, name: str, labels: tuple[tuple[str, str], ...], text: str) -> str:
    return mmap_key(family, name, [each for each, _ in labels], [value for _, value in labels], text)


def _values(family: Metric) -> Iterator[tuple[str, dict[str, str], float]]:
    """Key in a file, labels and value of each sample. Buckets in files lack what is in the smaller ones."""
    below = 0.0
    for sample in family.samples:
        value = sample.value
        if sample.name.endswith("_bucket"):
            value, below = value - below, 0.0 if sample.labels["le"] == "+Inf" else value
        elif family.type == "histogram" and sample.name.endswith("_count"):
            continue  # the collector counts what is in the buckets
        key = _key(family.name, sample.name, tuple(sample.labels.items()), family.documentation)
        yield key, sample.labels, value
