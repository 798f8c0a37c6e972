"""Whose prompt is next among those that wait on a worker: start-time fair queueing (Goyal, Vin, Cheng, 1996).

Owned by the scheduler; pure. Each tenant's prompts lie one after another on a line of tokens, beginning where the line
has been served to when he had none waiting. Prompts go in the order of their beginnings, so tenants that wait get equal
shares of tokens, a tenant alone is served first come first, and nobody saves up what he does not use.
"""

_MAX_IDLE = 1024  # tenants remembered that have nothing ahead


class Turns:
    def __init__(self) -> None:
        self._served = 0  # tokens on the line
        self._ends: dict[str, int] = {}  # of each tenant's last prompt

    def take(self, tenant: str, num_tokens: int) -> int:
        """Where a prompt that comes now begins."""
        begin = max(self._served, self._ends.get(tenant, 0))
        self._ends[tenant] = begin + num_tokens
        return begin

    def reached(self, begin: int) -> None:
        """The prompt that begins there is being computed."""
        self._served = max(self._served, begin)
        if len(self._ends) > _MAX_IDLE:
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._served}
