"""One child process: started from a command line, in a process group of its own, and gone with its parent.

A child is killed by the kernel when the thread that started it ends, so nothing survives a parent however it died.
Threads end with their process, and a cluster is started from its process's main thread.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a child. Its output is appended to `log`; None: it goes where the parent's goes."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    log: Path | None


class Child:
    """A started child. Whoever started it stops it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status; negative: the number of the signal that ended it."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, insist after `grace_s`, and take along what it started. Cancelled: insist at once."""
        try:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        finally:
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


async def start(command: Command) -> Child:
    """Raises OSError when the program cannot be run."""
    with command.log.open("ab") if command.log else contextlib.nullcontext() as log:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            env=dict(command.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT if log else None,
            process_group=0,  # Ctrl-C reaches the parent alone, which then stops its children in order
            preexec_fn=die_with(os.getpid()),
        )
    return Child(process)


def die_with(parent: int) -> Callable[[], None]:
    """For a `preexec_fn`: the kernel kills the child when the thread that started it ends."""
    libc = ctypes.CDLL(None)  # before the fork: the child may only make plain calls

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


def ending(status: int) -> str:
    """An exit status in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def last_lines(log: Path | None, count: int = 15) -> str:
    if log is None:
        return ""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(deque(lines, count)).rstrip()
    except OSError:
        return ""
