import asyncio
import os
import signal
from pathlib import Path

import pytest

from cluster.process import Command
from cluster.supervisor import NOT_STARTED, Backoff, Ended, Supervisor
from tests.cluster.children import SLEEP, announcing, ends_within, next_pid, python, stubborn


def impatient() -> Backoff:
    return Backoff(first_s=0.01, longest_s=0.02)


class Reports:
    """What a supervisor reported, to be awaited."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Ended] = asyncio.Queue()

    def __call__(self, ended: Ended) -> None:
        self._queue.put_nowait(ended)

    async def next(self) -> Ended:
        return await asyncio.wait_for(self._queue.get(), 20)


def test_the_delay_doubles_up_to_the_longest() -> None:
    backoff = Backoff(first_s=1, longest_s=10, steady_after_s=60)
    assert [backoff.after(0.1) for _ in range(6)] == [1, 2, 4, 8, 10, 10]


def test_a_steady_run_makes_a_fresh_beginning() -> None:
    backoff = Backoff(first_s=1, longest_s=10, steady_after_s=60)
    assert [backoff.after(ran) for ran in (0, 0, 0, 60, 0, 61)] == [1, 2, 4, 1, 2, 1]


async def test_a_killed_child_is_started_again(tmp_path: Path, fifo: Path) -> None:
    reports = Reports()
    commands = [python(tmp_path, "child", announcing(fifo))]
    async with Supervisor([commands], reports, backoff=impatient) as supervisor:
        first = await next_pid(fifo)
        os.kill(first, signal.SIGKILL)
        ended = await reports.next()
        assert (ended.command.name, ended.status, ended.restart_in_s) == ("child", -signal.SIGKILL, 0.01)
        assert "child was killed by SIGKILL" in str(ended)
        second = await next_pid(fifo)
        assert second != first
        assert supervisor.pids == {"child": second}
    assert ends_within(second, 0)


async def test_what_a_child_started_does_not_outlive_it(tmp_path: Path, fifo: Path) -> None:
    async def never(_seconds: float) -> None:
        await asyncio.Event().wait()

    reports, code = Reports(), f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {announcing(fifo)!r}])"
    commands = [python(tmp_path, "child", f"{code}; {SLEEP}")]
    async with Supervisor([commands], reports, sleep=never) as supervisor:
        grandchild, child = await next_pid(fifo), supervisor.pids["child"]
        os.kill(child, signal.SIGKILL)
        await reports.next()
        assert ends_within(grandchild, 10)


async def test_a_child_that_always_fails_waits_longer_each_time(tmp_path: Path) -> None:
    reports, slept = Reports(), []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            await asyncio.Event().wait()

    command = Command("child", ("/bin/false",), {}, tmp_path / "log")
    async with Supervisor([[command]], reports, sleep=sleep, backoff=lambda: Backoff(1, 3)):
        assert [(await reports.next()).status for _ in range(4)] == [1, 1, 1, 1]
    assert slept == [1, 2, 3, 3]


async def test_a_program_that_cannot_be_started_again_is_tried_on(tmp_path: Path) -> None:
    reports, program = Reports(), tmp_path / "program"
    program.write_text('#!/bin/sh\nrm "$0"\nexit 3\n')
    program.chmod(0o700)
    command = Command("child", (str(program),), {"PATH": os.defpath}, tmp_path / "log")
    async with Supervisor([[command]], reports, backoff=impatient):
        assert [(await reports.next()).status for _ in range(3)] == [3, NOT_STARTED, NOT_STARTED]


async def test_leaving_stops_every_child_and_reports_none(tmp_path: Path, fifo: Path) -> None:
    reported: list[Ended] = []
    commands = [python(tmp_path, "a", SLEEP), python(tmp_path, "b", stubborn(fifo)), python(tmp_path, "c", SLEEP)]
    async with Supervisor([commands], reported.append, grace_s=0.3) as supervisor:
        pids = list(supervisor.pids.values())
        await next_pid(fifo)
    assert len(pids) == 3
    assert all(ends_within(pid, 0) for pid in pids)
    assert reported == []
    assert supervisor.pids == {}


async def test_leaving_at_once_leaves_no_child(tmp_path: Path) -> None:
    async with Supervisor([[python(tmp_path, "child", SLEEP)]], print) as supervisor:
        (pid,) = supervisor.pids.values()
    assert ends_within(pid, 0)


async def test_a_program_that_cannot_run_leaves_no_other_running(tmp_path: Path, fifo: Path) -> None:
    bad = Command("bad", ("/nowhere/program",), {}, tmp_path / "bad.log")
    supervisor = Supervisor([[python(tmp_path, "good", announcing(fifo)), bad]], print, grace_s=5)
    with pytest.raises(FileNotFoundError):
        await supervisor.__aenter__()
    assert supervisor.pids == {}


async def test_a_second_interruption_kills_at_once(tmp_path: Path, fifo: Path) -> None:
    leaving = asyncio.Event()

    async def serve() -> None:
        stages = [[python(tmp_path, "child", stubborn(fifo))], [python(tmp_path, "later", SLEEP)]]
        async with Supervisor(stages, print, grace_s=600) as supervisor:
            pids.extend(supervisor.pids.values())
            await leaving.wait()

    pids: list[int] = []
    serving = asyncio.create_task(serve())
    await next_pid(fifo)
    leaving.set()
    done, _ = await asyncio.wait({serving}, timeout=0.1)
    assert not done
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, 20)
    assert len(pids) == 2
    assert all(ends_within(pid, 10) for pid in pids)


async def test_a_stage_is_stopped_when_the_one_before_it_has_ended(tmp_path: Path, fifo: Path) -> None:
    stages = [[python(tmp_path, "first", stubborn(fifo))], [python(tmp_path, "second", SLEEP)]]
    supervisor = Supervisor(stages, print, grace_s=600)
    async with asyncio.timeout(60):
        await supervisor.__aenter__()
        first, second = (supervisor.pids[name] for name in ("first", "second"))
        await next_pid(fifo)
        leaving = asyncio.create_task(supervisor.__aexit__())
        await asyncio.wait({leaving}, timeout=0.1)
        assert not ends_within(second, 0)
        os.kill(first, signal.SIGKILL)
        await leaving
    assert ends_within(second, 0)
    assert supervisor.pids == {}
