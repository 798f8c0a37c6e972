"""Virtual time: what happens when. The one clock of a simulation."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")


class Events:
    """Calls at equal times run in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []

    @property
    def idle(self) -> bool:
        """Nothing is left to happen."""
        return not self._heap

    def clock(self) -> float:
        """Seconds since the simulation's begin, for objects that take a clock."""
        return self.now

    def at(self, time: float, call: Callable[[*Ts], None], *args: *Ts) -> None:
        assert time >= self.now, (time, self.now)
        heappush(self._heap, (time, next(self._order), call, args))

    def after(self, seconds: float, call: Callable[[*Ts], None], *args: *Ts) -> None:
        self.at(self.now + seconds, call, *args)

    def step(self) -> bool:
        """Let the next thing happen; False when nothing is left."""
        if not self._heap:
            return False
        self.now, _, call, args = heappop(self._heap)
        call(*args)
        return True
