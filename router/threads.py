"""Threads for work that is long because a client sent much; the event loop has the streams of all others to write.

Made by `router.http`. A thread keeps the interpreter, and the loop from its turn, for as long as a single call into C
takes: what is done here consists of many calls, or `router.schema` has bounded what the one may have to do.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Threads:
    """Call `close` at the end: what has not begun by then is dropped."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")

    async def run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
