"""How fast a core is while a benchmark runs on it: on a shared machine it is fast and slow by turns.

A process on the same cores does a fixed piece of Python now and then, for a hundredth of their time, and says how much
CPU that took. `slowdown` compares what it took during a run with the best that it ever took.
"""

import multiprocessing
import os
import statistics
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

INTERVAL_S = 0.05
STEPS = 2_000  # some 0.4 ms
BEST_PART = 0.05  # of the samples: the best of many would be luck


class CoreSpeed:
    """Runs while entered."""

    def __init__(self, cores: set[int]) -> None:
        self._pipe, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_sample, args=(cores, theirs), daemon=True)
        self._theirs = theirs
        self._samples: list[tuple[float, float]] = []  # when, seconds

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def slowdown(self, since: float, until: float) -> float:
        """The mean from `since` to `until`, by time.monotonic, over the best so far; 1 where nothing was sampled."""
        while self._pipe.poll():
            self._samples.append(self._pipe.recv())
        during = [seconds for at, seconds in self._samples if since <= at <= until]
        ranked = sorted(seconds for _, seconds in self._samples)
        return statistics.mean(during) / ranked[int(BEST_PART * len(ranked))] if during else 1.0


def _sample(cores: set[int], pipe: Connection) -> None:
    os.sched_setaffinity(0, cores)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        while True:
            time.sleep(INTERVAL_S)
            began = time.thread_time()
            table: dict[int, str] = {}
            for number in range(STEPS):
                table[number * 7919 % STEPS] = str(number)
            pipe.send((time.monotonic(), time.thread_time() - began))
