"""One router as several processes that share its port: `baton router --workers N`.

The kernel spreads connections over the processes (SO_REUSEPORT). Each is a whole router, with its own sessions to the
workers, queue and metrics; they learn of each other's requests from the load that workers report. This parent serves
nothing: it starts a process again that ends, and on SIGTERM or SIGINT lets all of them finish.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.signals import DRAIN_GRACE_S, stop_signals
from cluster.checkpoint import resolve_model, spec_errors
from cluster.process import Command
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError
from cluster.supervisor import Supervisor
from router.server import check_free

log = logging.getLogger(__name__)

CUT_S = 2.0  # beyond their own time to finish, before they are killed


async def run_router_processes(spec: ClusterSpec, spec_path: Path, *, index: int, options: Sequence[str] = ()) -> None:
    """Serve by `spec.router.workers` processes until told to stop. Raises SpecError, or OSError for a taken port."""
    router = spec.router
    if router.port == 0:
        raise SpecError([f"router.port: 0 is not allowed with {router.workers} router processes; allowed: 1 to 65535"])
    with spec_errors():  # here once, rather than in every process again and again
        resolve_model(spec.model, spec.load)
    check_free(router.host, router.port)  # processes that share a port would share it with anybody
    own = (sys.executable, "-m", "baton", "router", "--spec", str(spec_path), "--index", str(index), *options)
    commands = [
        Command(f"router process {number}", (*own, "--process", str(number)), os.environ, log=None)
        for number in range(router.workers)
    ]
    with stop_signals() as stop:
        async with Supervisor(commands, lambda ended: log.error("%s", ended), grace_s=DRAIN_GRACE_S + CUT_S):
            await stop.wait()
