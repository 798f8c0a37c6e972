"""Keeps the processes of a cluster on one machine running: what ends is started again, ever more slowly.

Owns its children from entering the context to leaving it; afterwards none is left, nor anything they started.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Self

from cluster.process import Child, Command, ending, start

NOT_STARTED = 127  # the status that shells give to a program that cannot be run
GRACE_S = 30.0  # what orchestrators give between SIGTERM and SIGKILL, too


class ClusterFailed(Exception):
    """The cluster did not come up. The message quotes the log of the process at fault."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A child ended without being asked to, and will be started again in `restart_in_s`."""

    command: Command
    status: int
    ran_for_s: float
    restart_in_s: float

    def __str__(self) -> str:
        text = (
            f"{self.command.name} {ending(self.status)} after {self.ran_for_s:.1f} s; "
            f"starting it again in {self.restart_in_s:.1f} s"
        )
        return text if self.command.log is None else f"{text}; its log: {self.command.log}"


class Backoff:
    """How long to wait before the next start. Pure. A long enough run is a fresh beginning."""

    def __init__(self, first_s: float = 0.5, longest_s: float = 30.0, steady_after_s: float = 60.0) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._steady_after_s = steady_after_s
        self._next_s = first_s

    def after(self, ran_for_s: float) -> float:
        """The delay after a run of `ran_for_s`."""
        delay = self._first_s if ran_for_s >= self._steady_after_s else self._next_s
        self._next_s = min(2 * delay, self._longest_s)
        return delay


class Supervisor:
    """`stages` are stopped one after another, the children of each at once; all of that may take `grace_s`. `report`
    is called for every unasked-for ending."""

    def __init__(
        self,
        stages: Sequence[Sequence[Command]],
        report: Callable[[Ended], None],
        *,
        grace_s: float = GRACE_S,
        backoff: Callable[[], Backoff] = Backoff,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._stages = stages
        self._report = report
        self._grace_s = grace_s
        self._backoff = backoff
        self._clock = clock
        self._sleep = sleep
        self._running: dict[str, Child] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> dict[str, int]:
        """Of the children that run now, by name."""
        return {name: child.pid for name, child in self._running.items()}

    async def __aenter__(self) -> Self:
        """Start every child. Raises OSError when a program cannot be run; then none is left running."""
        try:
            for command in chain.from_iterable(self._stages):
                self._running[command.name] = await start(command)
                self._keepers.append(asyncio.create_task(self._keep(command), name=command.name))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """Cancelled, it kills what it would have waited for."""
        for keeper in self._keepers:
            keeper.cancel()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace_s
        try:
            for stage in self._stages:
                names = [command.name for command in stage if command.name in self._running]
                grace_s = max(0.0, until - loop.time())
                stops = [self._running[name].stop(grace_s) for name in names]
                await asyncio.gather(*stops, return_exceptions=True)
                for name in names:
                    del self._running[name]
        finally:
            rest = [child.stop(0) for child in self._running.values()]
            await asyncio.gather(*rest, *self._keepers, return_exceptions=True)
            self._running.clear()

    async def _keep(self, command: Command) -> None:
        """Wait for the running child's end and start the next, forever."""
        backoff = self._backoff()
        while True:
            started, status = self._clock(), NOT_STARTED
            child = self._running.get(command.name)
            if child is not None:
                status = await child.wait()
                await child.stop(0)  # what it started does not outlive it
                del self._running[command.name]
            ran_for_s = self._clock() - started
            delay = backoff.after(ran_for_s)
            self._report(Ended(command, status, ran_for_s, delay))
            await self._sleep(delay)
            with suppress(OSError):  # such as too many processes: reported as one that ended at once
                self._running[command.name] = await start(command)
