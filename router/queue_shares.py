"""What part of a worker's queue goes before a newcomer of some priority.

Owned by the placement. Workers report how long their queues take, but not how urgent those prompts are, and compute the
more urgent ones first. How urgent they are is taken from what this router has sent, until a first token is expected or
it is over; what others have sent is taken to be like it. So this is a part of what is reported, not seconds.

Tenants of one priority pass each other, too, but a router that counted on that would promise the time of those who came
before to those who come now.
"""

from heapq import heappop, heappush
from itertools import count

import numpy as np

from router.compiled import Floats, Ints

_MAX_PRIORITIES = 16  # told apart: each costs time in decisions, and clients choose them


class QueuedPrompt:
    """One that a worker was sent; who has it may `drop` it."""

    __slots__ = ("priority", "slot", "us")

    def __init__(self, priority: int, slot: int, us: int) -> None:
        self.priority = priority
        self.slot = slot
        self.us = us  # of work, whole ones: sums of floats would not come down to zero


class QueueShares:
    """By slot of the prefix index. Times are by one clock."""

    def __init__(self) -> None:
        self._num_slots = 0
        self._ends: list[tuple[float, int, QueuedPrompt]] = []  # heap
        self._numbers = count()
        self._work: dict[int, Ints] = {}  # us by slot; by priority
        self._sums: dict[int, int] = {}  # of those
        self._total: Ints = np.zeros(0, np.intp)  # likewise

    def placed(self, priority: int, slot: int, work_s: float, until: float) -> QueuedPrompt:
        """A prompt of so much work was sent to a worker, and its first token is expected by then."""
        self._grow(slot + 1)
        if priority not in self._work:
            if len(self._work) < _MAX_PRIORITIES:
                self._work[priority], self._sums[priority] = np.zeros(self._num_slots, np.intp), 0
            else:  # more urgent than it is, so that nobody is promised its time
                priority = max((each for each in self._work if each < priority), default=min(self._work))
        prompt = QueuedPrompt(priority, slot, max(1, int(work_s * 1e6)))
        self._count(prompt, prompt.us)
        heappush(self._ends, (until, next(self._numbers), prompt))
        return prompt

    def drop(self, prompt: QueuedPrompt) -> None:
        """It is over. Idempotent."""
        if prompt.us:
            self._count(prompt, -prompt.us)
            prompt.us = 0
            if not self._sums[prompt.priority]:
                del self._work[prompt.priority], self._sums[prompt.priority]

    def part_ahead(self, priority: int, num_slots: int, now: float) -> Floats | None:
        """By slot. None: all of each queue."""
        while self._ends and self._ends[0][0] <= now:
            self.drop(heappop(self._ends)[2])
        before = [work for other, work in self._work.items() if other <= priority]
        if len(before) == len(self._work):
            return None
        self._grow(num_slots)
        ahead: Ints = np.sum(before, axis=0) if before else np.zeros_like(self._total)
        part: Floats = np.where(self._total > 0, ahead / np.maximum(self._total, 1), 1.0)
        return part

    def move(self, slot: int, to: int) -> None:
        """The worker has another slot."""
        self._grow(to + 1)
        for work in (self._total, *self._work.values()):
            work[[slot, to]] = work[[to, slot]]
        for _, _, prompt in self._ends:
            if prompt.slot == slot:
                prompt.slot = to

    def forget(self, slot: int) -> None:
        """The worker is gone."""
        for _, _, prompt in self._ends:
            if prompt.slot == slot:
                self.drop(prompt)

    def _count(self, prompt: QueuedPrompt, us: int) -> None:
        self._work[prompt.priority][prompt.slot] += us
        self._total[prompt.slot] += us
        self._sums[prompt.priority] += us

    def _grow(self, num_slots: int) -> None:
        more = num_slots - self._num_slots
        if more > 0:
            more = max(more, self._num_slots)  # seldom
            self._num_slots += more
            self._total = np.pad(self._total, (0, more))
            self._work = {priority: np.pad(work, (0, more)) for priority, work in self._work.items()}
