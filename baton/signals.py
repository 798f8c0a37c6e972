"""How the processes of a cluster are asked to stop."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

DRAIN_GRACE_S = 25.0  # below the 30 s that orchestrators give a process between SIGTERM and SIGKILL


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
