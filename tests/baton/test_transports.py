import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.transports import server_transports, sink_transports
from cluster.spec import FoundDevice
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from engine.kv.memory import HostMemory
from engine.server import WorkerIdentity

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")
IDENTITY = WorkerIdentity("prefill-0", "1", "model", advertise_host="127.0.0.1")


@pytest.fixture
def host() -> Iterator[HostMemory]:
    memory = HostMemory(LAYOUT, 4)
    yield memory
    memory.close()


def names(memory: Any, asked: str, device: FoundDevice) -> tuple[list[str], list[str]]:
    """Of what the two ends of a transfer offer."""
    spec = parse_spec({"model": "tiny", "transfer": {"transport": asked}})
    pool = spec.pool("prefill", device)
    executor: Any = SimpleNamespace(memory=memory)
    servers = server_transports(spec, pool, IDENTITY, executor)
    sinks = sink_transports(spec, pool, IDENTITY, executor)
    for server in servers:
        server.close()
    return [server.name for server in servers], [sink.name for sink in sinks]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", ["shared_memory", "tcp"]), ("tcp", ["tcp"]), ("shared_memory", ["shared_memory"])],
)
def test_host_memory_is_read_in_the_ways_of_the_cpu(host: HostMemory, asked: str, expected: list[str]) -> None:
    assert names(host, asked, "cpu") == (expected, expected)


@pytest.fixture
def no_gpu_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cupy", "kv_transfer.transports.cuda_ipc"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("no_gpu_libraries")
def test_device_memory_is_read_with_what_this_machine_has_the_libraries_for(caplog: pytest.LogCaptureFixture) -> None:
    assert names(DeviceMemory(LAYOUT, 4, torch.device("cpu")), "auto", "cuda") == (["tcp"], ["tcp"])
    assert "KV does not move over nccl here" in caplog.text


@pytest.mark.usefixtures("no_gpu_libraries")
def test_a_transport_that_was_asked_for_and_cannot_be_had_is_refused() -> None:
    with pytest.raises(SpecError, match=r"transfer\.transport: 'nccl' cannot be used here: .*cupy"):
        names(DeviceMemory(LAYOUT, 4, torch.device("cpu")), "nccl", "cuda")
