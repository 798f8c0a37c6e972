"""One router as several processes that share its port: `baton router --workers N`.

The kernel spreads connections over the processes (SO_REUSEPORT). Each is a whole router, with its own sessions to the
workers and its own queue; they learn of each other's requests from the load that workers report, and of each other's
metrics from files in a directory of this parent. The parent serves nothing: it starts a process again that ends, gives
up when one cannot stay up, and on SIGTERM or SIGINT lets all of them finish.
"""

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client.multiprocess import mark_process_dead

from baton.signals import DRAIN_GRACE_S, stop_signals
from cluster.checkpoint import resolve_model, spec_errors
from cluster.credentials import check_secrets
from cluster.process import Command, ending
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError
from cluster.supervisor import Backoff, ClusterFailed, Ended, Supervisor
from router.server import check_free

log = logging.getLogger(__name__)

CUT_S = 2.0  # beyond their own time to finish, before they are killed
STEADY_S = 30.0  # a process that ran for so long did start
MAX_FAILED_STARTS = 4  # of one process in a row: the waits between them double


class Watch:
    """Sets `stop` once a process has failed to start too often; `failure` then says which and how."""

    def __init__(self, commands: Sequence[Command], metrics_dir: Path, stop: asyncio.Event) -> None:
        self.failure = ""
        self._numbers = {command.name: number for number, command in enumerate(commands)}
        self._metrics_dir = metrics_dir
        self._stop = stop
        self._failed_starts: Counter[str] = Counter()

    def ended(self, ended: Ended) -> None:
        name = ended.command.name
        mark_process_dead(self._numbers[name], str(self._metrics_dir))
        if ended.ran_for_s >= STEADY_S:
            self._failed_starts[name] = 0
        else:
            self._failed_starts[name] += 1
        if self._failed_starts[name] < MAX_FAILED_STARTS:
            log.error("%s", ended)
        elif not self.failure:
            self.failure = (
                f"{name} failed {MAX_FAILED_STARTS} times in a row within {STEADY_S:.0f} s of its start; "
                f"the last time it {ending(ended.status)}; its own messages are above"
            )
            self._stop.set()


async def run_router_processes(spec: ClusterSpec, spec_path: Path, *, index: int, options: Sequence[str] = ()) -> None:
    """Serve by `spec.router.workers` processes until told to stop.

    Raises SpecError, OSError for a taken port, and ClusterFailed when a process cannot stay up.
    """
    router = spec.router
    if router.port == 0:
        raise SpecError([f"router.port: 0 is not allowed with {router.workers} router processes; allowed: 1 to 65535"])
    check_secrets(spec)  # like the checkpoint, here once rather than in every process again and again
    with spec_errors():
        resolve_model(spec.model, spec.load)
    check_free(router.host, router.port)  # processes that share a port would share it with anybody
    own = (sys.executable, "-m", "baton", "router", "--spec", str(spec_path), "--index", str(index), *options)
    with stop_signals() as stop, TemporaryDirectory(prefix="baton-metrics-") as metrics_dir:
        commands = [
            Command(
                f"router process {number}",
                (*own, "--process", str(number), "--metrics-dir", metrics_dir),
                os.environ,
                log=None,
            )
            for number in range(router.workers)
        ]
        watch = Watch(commands, Path(metrics_dir), stop)
        async with Supervisor([commands], watch.ended, grace_s=DRAIN_GRACE_S + CUT_S, backoff=_backoff):
            await stop.wait()
    if watch.failure:
        raise ClusterFailed(watch.failure)


def _backoff() -> Backoff:
    return Backoff(steady_after_s=STEADY_S)
