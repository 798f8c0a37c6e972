"""What part of a worker's queue goes before a newcomer of some priority.

Owned by the placement. Workers report how long their queues take, but not how urgent those prompts are, and compute the
more urgent ones first. How urgent they are is taken from what this router has sent and expects to be without a first
token still; what others have sent is taken to be like it. So this is a part of what is reported, not seconds.

Tenants of one priority pass each other, too, but a router that counted on that would promise the time of those who came
before to those who come now.
"""

from collections import Counter
from heapq import heapify, heappop, heappush

import numpy as np

from router.worker_table import Floats, Ints

_MAX_EXPIRED = 4  # in one call: after a pause many are over at once


class QueueShares:
    """By slot of the prefix index. Times are by one clock."""

    def __init__(self) -> None:
        self._num_slots = 0
        self._sent: list[tuple[float, int, int, int]] = []  # heap of until when, priority, slot, work
        self._work: dict[int, Ints] = {}  # us, as sums of floats would not come down to zero; by priority, then slot
        self._num_sent: Counter[int] = Counter()  # by priority

    def placed(self, priority: int, slot: int, work_s: float, until: float) -> None:
        """A prompt of so much work was sent to a worker, and its first token is expected by then."""
        us = int(work_s * 1e6)
        self._grow(slot + 1)
        if priority not in self._work:
            self._work[priority] = np.zeros(self._num_slots, np.intp)
        self._work[priority][slot] += us
        self._num_sent[priority] += 1
        heappush(self._sent, (until, priority, slot, us))

    def part_ahead(self, priority: int, num_slots: int, now: float) -> Floats | None:
        """By slot. None: all of each queue."""
        self._expire(now)
        if max(self._work, default=priority) <= priority:
            return None
        self._grow(num_slots)
        total: Ints = np.sum(list(self._work.values()), axis=0)
        ahead: Ints = np.sum([total * 0, *(us for other, us in self._work.items() if other <= priority)], axis=0)
        part: Floats = np.where(total > 0, ahead / np.maximum(total, 1), 1.0)
        return part

    def forget(self, slot: int) -> None:
        """The worker there is gone, or has another slot."""
        gone = [sent for sent in self._sent if sent[2] == slot]
        self._sent = [sent for sent in self._sent if sent[2] != slot]
        heapify(self._sent)
        for sent in gone:
            self._take_out(sent)

    def _expire(self, now: float) -> None:
        for _ in range(_MAX_EXPIRED):
            if not self._sent or self._sent[0][0] > now:
                return
            self._take_out(heappop(self._sent))

    def _take_out(self, sent: tuple[float, int, int, int]) -> None:
        _, priority, slot, us = sent
        self._work[priority][slot] -= us
        self._num_sent[priority] -= 1
        if not self._num_sent[priority]:
            del self._work[priority], self._num_sent[priority]

    def _grow(self, num_slots: int) -> None:
        more = num_slots - self._num_slots
        if more > 0:
            more = max(more, self._num_slots)  # seldom
            self._num_slots += more
            self._work = {priority: np.pad(us, (0, more)) for priority, us in self._work.items()}
