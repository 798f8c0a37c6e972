"""What a spec and a profile say of a simulated cluster."""

from typing import Any

import msgspec
import pytest

from baton.step_profiles import load_profile
from cluster.simulation.setup import make_pool, make_setup
from cluster.simulation.transfer import TransferSpeed
from cluster.spec_file import parse_spec
from engine.step_profile import StepProfile
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import RoundRobin


def profile(tensor_parallel: int = 1) -> StepProfile:
    measured = load_profile("h200-llama-3-8b").measured  # 131,072 bytes a token
    return StepProfile(msgspec.structs.replace(measured, tensor_parallel=tensor_parallel))


@pytest.mark.parametrize(
    ("pool", "block_size", "expected"),  # blocks, and tokens of each
    [
        ({"num_blocks": 1000}, None, (125, 128)),  # 16 tokens of each block, in blocks of the least size
        ({"num_blocks": 1000}, 16, (1000, 16)),
        ({"memory": "1GiB"}, None, (64, 128)),
    ],
)
def test_a_worker_has_the_specs_memory_on_each_of_its_gpus(
    pool: dict[str, Any], block_size: int | None, expected: tuple[int, int]
) -> None:
    spec = parse_spec({"model": "m", "kv_cache": pool})
    for tensor_parallel in (1, 2):
        made = make_pool(spec, "decode", profile(tensor_parallel), block_size)
        assert (made.num_blocks, made.block_size) == (tensor_parallel * expected[0], expected[1])
        assert made.gpus == tensor_parallel


def test_the_limits_of_a_spec_reach_its_simulation() -> None:
    router = {"slo": {"ttft_s": 2.0, "tpot_s": 0.05}, "max_queue": 7, "max_running": 3}
    spec = parse_spec({"model": "m", "kv_cache": {"memory": "1GiB"}, "router": router, "transfer": {"lease_s": 9}})
    profiles = {"prefill": profile(), "decode": profile()}
    setup = make_setup(spec, profiles, policy=RoundRobin, speed=TransferSpeed(1e9, 0.0), num_routers=4)
    assert (setup.ttft_s, setup.tpot_s, setup.lease_s, setup.num_routers) == (2.0, 0.05, 9.0, 4)
    assert setup.placement == PlacementConfig(AdmissionConfig(max_queue=7, max_running=3))
