import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.process import ending, last_lines, start
from tests.cluster.children import SLEEP, announcing, ends_within, next_pid, python, stubborn


async def test_output_of_every_life_is_kept_in_the_log(tmp_path: Path) -> None:
    command = python(tmp_path, "child", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    for _ in range(2):
        child = await start(command)
        assert await child.wait() == 3
    assert sorted(last_lines(command.log).split()) == ["err", "err", "out", "out"]


async def test_a_child_that_heeds_sigterm_is_not_killed(tmp_path: Path) -> None:
    child = await start(python(tmp_path, "child", SLEEP))
    await child.stop(grace_s=10)
    assert await child.wait() == -signal.SIGTERM


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, fifo: Path) -> None:
    child = await start(python(tmp_path, "child", stubborn(fifo)))
    assert await next_pid(fifo) == child.pid
    await child.stop(grace_s=0.05)
    assert await child.wait() == -signal.SIGKILL


async def test_a_frozen_child_is_killed_after_the_grace(tmp_path: Path, fifo: Path) -> None:
    code = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); {announcing(fifo)}"
    child = await start(python(tmp_path, "child", code))
    os.kill(await next_pid(fifo), signal.SIGSTOP)
    await child.stop(grace_s=0.05)
    assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_started_goes_with_it(tmp_path: Path, fifo: Path) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn(fifo)!r}]); {SLEEP}"
    child = await start(python(tmp_path, "child", code))
    grandchild = await next_pid(fifo)
    assert grandchild != child.pid
    await child.stop(grace_s=10)
    assert ends_within(grandchild, 10)


async def test_a_cancelled_stop_kills_at_once(tmp_path: Path, fifo: Path) -> None:
    child = await start(python(tmp_path, "child", stubborn(fifo)))
    await next_pid(fifo)
    stopping = asyncio.create_task(child.stop(grace_s=600))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await asyncio.wait_for(child.wait(), 20) == -signal.SIGKILL


async def test_a_program_that_does_not_exist_is_an_os_error(tmp_path: Path) -> None:
    command = python(tmp_path, "child", "")
    with pytest.raises(FileNotFoundError):
        await start(type(command)("child", ("/nowhere/program",), {}, command.log))


async def test_children_are_killed_with_a_killed_parent(tmp_path: Path, fifo: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from cluster.process import start
from tests.cluster.children import python

async def main():
    child = await start(python(Path({str(tmp_path)!r}), "child", {stubborn(fifo)!r}))
    await child.wait()

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    child = await next_pid(fifo)
    assert not ends_within(child, 0)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    assert ends_within(child, 10)


def test_an_ending_is_put_in_words() -> None:
    assert ending(-9) == "was killed by SIGKILL"
    assert ending(3) == "ended with status 3"


def test_the_end_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\n".join(b"line %d \xff" % number for number in range(100)))
    assert last_lines(log, 2).splitlines() == ["line 98 �", "line 99 �"]
    assert last_lines(tmp_path / "absent") == ""
