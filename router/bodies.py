"""How many bytes of requests' bodies a router holds: read, waiting for a thread, or being made into prompts.

Made by `router.http`; `router.exchange` asks before it keeps more of a body. What every request may have is not
counted, so that clients with long bodies, or that never send the rest of one, cannot keep out those with short ones.
"""

from typing import Self

from router.errors import SERVER, ApiError


class BodyBudget:
    """`num_bytes` are held now, beyond the first `free_bytes` of each body."""

    def __init__(self, max_bytes: int, free_bytes: int) -> None:
        self.num_bytes = 0
        self.max_bytes = max_bytes
        self.free_bytes = free_bytes

    def share(self) -> "Share":
        return Share(self)


class Share:
    """What one body takes, given back when left."""

    __slots__ = ("_budget", "_num_bytes")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.num_bytes -= self._num_bytes

    def grow(self, size: int) -> None:
        """The body has `size` bytes now. Raises ApiError 503 when there is no room for them."""
        budget = self._budget
        more = size - budget.free_bytes - self._num_bytes
        if more <= 0:
            return
        if budget.num_bytes + more > budget.max_bytes:
            message = "too many long bodies are being received"
            raise ApiError(503, message, SERVER, code="overloaded", headers=((b"retry-after", b"1"),))
        self._num_bytes += more
        budget.num_bytes += more
