"""How long a decode worker with random weights takes from the start of its process until it has registered.

The first run also compiles what no cache holds; the others show a start once kernels are cached. Registration is seen
up to a quarter of a second late.

    python -m benchmarks.gpu.start
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.harness import model_directory, parser, show
from cluster.launcher import SPEC_NAME, commands, on_this_machine
from cluster.process import last_lines, start
from cluster.registry.open import open_registry
from cluster.run_dir import prepare_run_dir
from cluster.spec_file import parse_spec, save_spec
from router.membership import Joined

TIMEOUT_S = 600.0
GRACE_S = 20.0
COLUMNS = {"run": "d", "seconds": ".2f", "status": "s"}


async def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=2, help="starts, one after another (default: %(default)s)")
    args = options.parse_args()
    rows = []
    with model_directory(args.config) as model:
        for run in range(args.runs):
            rows.append({"run": run + 1, **await one_start(model, args)})
    show(args, None, COLUMNS, rows)


async def one_start(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        fields = {
            "model": str(model),
            "load": "dummy",
            "device": args.device,
            "quantization": args.quantization,
            "kv_cache": {"dtype": args.kv_cache_dtype},
            "prefill": {"replicas": 0},
            "router": {"port": 0},
            "run_dir": str(run_dir),
        }
        spec = on_this_machine(parse_spec(fields), os.environ)
        prepare_run_dir(run_dir)
        (run_dir / "logs").mkdir()
        save_spec(spec, run_dir / SPEC_NAME)
        _, command = commands(spec, run_dir / SPEC_NAME, os.environ)
        registry = open_registry(spec)
        began = time.perf_counter()
        child = await start(command)
        joined = asyncio.create_task(until_joined(registry))
        ended = asyncio.create_task(child.wait())
        try:
            await asyncio.wait({joined, ended}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            seconds = time.perf_counter() - began
            if not joined.done():
                raise SystemExit(f"the worker did not start; the end of its log:\n{last_lines(command.log)}")
        finally:
            joined.cancel()
            await child.stop(GRACE_S)
            with contextlib.suppress(asyncio.CancelledError):
                await joined
            await registry.aclose()
        return {"seconds": seconds, "status": f"exit {await ended}"}


async def until_joined(registry: Any) -> None:
    async with contextlib.aclosing(registry.watch()) as events:
        async for event in events:
            if isinstance(event, Joined):
                return


if __name__ == "__main__":
    asyncio.run(main())
