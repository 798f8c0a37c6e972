"""Which tenant's request is next: deficit round robin (Shreedhar and Varghese, 1995) over tokens.

Tenants that wait take turns. A turn adds a quantum to what the tenant may spend, and its requests go, oldest first, as
long as that pays for them; what is left stays for its next turn. So over time tenants that wait get equal shares of
tokens, however long their prompts and answers are, and nobody's share is kept while he has nothing to send. A tenant
that waits alone is served first come first.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

QUANTUM = 512  # tokens of a turn, as many as one short request costs; larger ones take several turns
OUTPUT_WEIGHT = 2.0  # of a token of the answer, which is made one by one (as in VTC: Sheng et al., 2024)


def cost_of(num_prompt_tokens: int, num_output_tokens: float) -> int:
    """Tokens that a request is charged, at least 1. How long its answer gets is a guess."""
    return num_prompt_tokens + int(OUTPUT_WEIGHT * num_output_tokens)


class Place(msgspec.Struct, Generic[T], frozen=True):
    """`arrival` is unique. `cost` in tokens: nothing for one that has been paid for."""

    entry: T
    tenant: str
    arrival: int
    cost: int


@dataclass(slots=True)
class _Line(Generic[T]):
    """What one tenant has waiting."""

    allowance: int = 0  # tokens
    live: dict[int, Place[T]] = field(default_factory=dict)  # by arrival
    heap: list[int] = field(default_factory=list)  # of arrivals; those that have left stay until they surface

    def first(self) -> Place[T]:
        while self.heap[0] not in self.live:
            heapq.heappop(self.heap)
        return self.live[self.heap[0]]

    def remove(self, arrival: int) -> None:
        del self.live[arrival]
        if len(self.heap) > 2 * len(self.live) + 64:
            self.heap = sorted(self.live)


class FairQueue(Generic[T]):
    """Entries of one priority. Empty queues have no head."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._turns: deque[str] = deque()  # tenants that wait; it is the first one's turn

    def __bool__(self) -> bool:
        return bool(self._turns)

    def push(self, place: Place[T]) -> None:
        line = self._lines.get(place.tenant)
        if line is None:
            line = self._lines[place.tenant] = _Line()
            self._turns.append(place.tenant)
            if len(self._turns) == 1:
                line.allowance = QUANTUM
        line.live[place.arrival] = place
        heapq.heappush(line.heap, place.arrival)

    def head(self) -> Place[T]:
        """The next one to go; the same until it is removed or another one is put back."""
        turns, lines = self._turns, self._lines
        while True:
            for _ in range(len(turns)):
                line = lines[turns[0]]
                place = line.first()
                if len(turns) == 1 or place.cost <= line.allowance:
                    return place
                turns.rotate(-1)
                lines[turns[0]].allowance += QUANTUM
            # Rounds in which nobody's turn would pay for anything are added at once.
            missing = min(line.first().cost - line.allowance for line in lines.values())
            for line in lines.values():
                line.allowance += max(0, missing // QUANTUM - 1) * QUANTUM

    def last(self) -> Place[T] | None:
        """The newest of the tenant with the most waiting; None when all have been paid for, that is dispatched once."""
        lines = sorted(self._lines.values(), key=lambda line: (len(line.live), next(reversed(line.live))), reverse=True)
        return next((place for line in lines for place in reversed(line.live.values()) if place.cost), None)

    def take(self) -> Place[T]:
        """Remove the head and charge its tenant."""
        place = self.head()
        if len(self._turns) > 1:
            self._lines[place.tenant].allowance -= place.cost
        self.remove(place)
        return place

    def remove(self, place: Place[T]) -> None:
        line = self._lines[place.tenant]
        line.remove(place.arrival)
        if not line.live:
            was_first = self._turns[0] == place.tenant
            del self._lines[place.tenant]
            self._turns.remove(place.tenant)
            if was_first and self._turns:
                self._lines[self._turns[0]].allowance += QUANTUM
