"""Helpers of the process tests: small child programs, and waiting for any process's end without polling."""

import asyncio
import os
import select
import sys
from pathlib import Path

from cluster.process import Command

SLEEP = "import time; time.sleep(600)"


def announcing(fifo: Path, code: str = SLEEP) -> str:
    """A program that writes its process id to `fifo`, then goes on with `code`."""
    return f"import os; os.write(os.open({str(fifo)!r}, os.O_WRONLY), b'%d\\n' % os.getpid()); {code}"


def stubborn(fifo: Path) -> str:
    """A program that ignores SIGTERM from when it has announced itself."""
    return f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {announcing(fifo)}"


def python(tmp_path: Path, name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", code), dict(os.environ), tmp_path / f"{name}.log")


def ends_within(pid: int, seconds: float) -> bool:
    """Whether the process is gone, or goes in time. It need not be a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


async def next_pid(fifo: Path) -> int:
    """Waits for the next program that announces itself."""

    def read() -> int:
        with fifo.open() as lines:
            return int(lines.readline())

    return await asyncio.wait_for(asyncio.to_thread(read), 20)
