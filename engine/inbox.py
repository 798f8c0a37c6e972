"""The bridge into an engine thread: any thread posts, the engine thread takes everything at once."""

from collections import deque
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """An unbounded queue with one reader. Its writers are bounded where requests are admitted."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._condition = Condition()

    def post(self, item: T) -> None:
        with self._condition:
            self._items.append(item)
            self._condition.notify()

    def take(self, timeout: float) -> list[T]:
        """Everything posted so far; when nothing is, wait up to `timeout` seconds for something."""
        with self._condition:
            if not self._items and timeout > 0:
                self._condition.wait(timeout)
            items = list(self._items)
            self._items.clear()
        return items
