"""Every executor under the one contract."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from engine.executors.base import Executor
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from tests.checkpoints import make_checkpoint
from tests.engine.executor_contract import CHECKS
from tests.fakes import instant_executor


@pytest.fixture(scope="module", params=["simulated", "simulated-two-in-flight", "torch-llama", "torch-mistral"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    kind, _, family = request.param.partition("-")
    if kind == "simulated":
        clock = time.monotonic if family else None
        make: Callable[[], Executor] = partial(instant_executor, block_size=8, num_blocks=64, clock=clock)
    else:
        path = make_checkpoint(tmp_path_factory.mktemp(family), family, tokenizer=False)
        make = partial(TorchExecutor, path, TorchConfig(block_size=8, num_blocks=64, layers_per_group=1, num_threads=1))
    executor = make()
    yield executor
    executor.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_executor_keeps_the_contract(check: Callable[[Executor], None], executor: Executor) -> None:
    check(executor)
