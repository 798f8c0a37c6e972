"""Whose prompt is next among those of one priority that wait on a worker: start-time fair queueing (Goyal, Vin, Cheng,
1996).

Owned by the scheduler; pure. Each tenant's prompts lie one after another on a line of tokens, beginning where the line
has been served to when he had none waiting. Prompts go in the order of their beginnings, so tenants that wait get equal
shares of tokens, a tenant alone is served first come first, and nobody saves up what he does not use. Each priority has
a line of its own, or one urgent prompt of a tenant would carry it past all else that he has waiting.
"""

_MAX_IDLE = 1024  # tenants that have nothing ahead, and priorities without any tenant that has, remembered


class Turns:
    def __init__(self) -> None:
        self._served: dict[int, int] = {}  # tokens on the line; by priority
        self._ends: dict[tuple[int, str], int] = {}  # of the last prompt; by priority and tenant
        self._first = 0  # where the lines of other priorities have been served to

    def take(self, priority: int, tenant: str, num_tokens: int) -> int:
        """Where a prompt that comes now begins."""
        begin = max(self._served.get(priority, self._first), self._ends.get((priority, tenant), 0))
        self._ends[priority, tenant] = begin + num_tokens
        return begin

    def reached(self, priority: int, begin: int) -> None:
        """The prompt that begins there is being computed."""
        served = self._served
        served[priority] = max(served.get(priority, self._first), begin)
        if len(self._ends) > _MAX_IDLE:
            self._ends = {key: end for key, end in self._ends.items() if end > served.get(key[0], self._first)}
        if len(served) > _MAX_IDLE:
            used = {priority for priority, _ in self._ends}
            self._first = max(self._first, *(served.pop(each) for each in served.keys() - used - {priority}), 0)
