"""A simulation's setup from a spec and a step profile. Raises SpecError with the field at fault."""

from collections.abc import Callable, Mapping

from cluster.devices import profiled_device
from cluster.routing import make_policy, placement_config
from cluster.simulation.baselines import BlockCost, CacheAware, MinimumTtft, PrefixOnly
from cluster.simulation.engine import StepSeconds
from cluster.simulation.simulation import PoolSetup, Setup
from cluster.simulation.trace import TRACE_BLOCK
from cluster.simulation.transfer import TransferSpeed
from cluster.spec import ROLES, ClusterSpec, PoolSettings, Role
from cluster.spec_errors import SpecError
from engine.scheduler import SchedulerConfig
from engine.step_profile import StepProfile
from router.policies import RoutingPolicy

# Costs of a simulation grow with its blocks. Traces tell prefixes apart by 512 tokens, so blocks of 128 give the same
# figures as blocks of 16 (docs/simulation.md).
MIN_BLOCK_SIZE = 128

BASELINES: Mapping[str, Callable[[], RoutingPolicy]] = {
    "prefix_only": PrefixOnly,
    "sglang": CacheAware,
    "dynamo": BlockCost,
    "mooncake": MinimumTtft,
}
POLICIES = ("prefix_aware", "round_robin", "least_loaded", *BASELINES)


def policy_maker(spec: ClusterSpec, name: str | None) -> Callable[[], RoutingPolicy]:
    """The spec's own policy where `name` is None."""
    if name is not None and name in BASELINES:
        return BASELINES[name]
    if name is not None and name not in POLICIES:
        raise SpecError([f"--policy: {name!r} is not known; allowed: {', '.join(POLICIES)}"])
    router = spec.router if name is None else spec.router.model_copy(update={"policy": name})
    return lambda: make_policy(router)


def make_setup(
    spec: ClusterSpec,
    profiles: Mapping[Role, StepProfile],
    *,
    policy: Callable[[], RoutingPolicy],
    speed: TransferSpeed | None = None,
    num_routers: int | None = None,
    block_size: int | None = None,
) -> Setup:
    """`profiles` by role. `speed` None: that of the decode workers' profile. `num_routers` None: the processes of the
    spec's router. `block_size` None: the spec's, but at least MIN_BLOCK_SIZE."""
    measured = profiles["decode"].measured
    if speed is None and measured.transfer is None:
        raise SpecError(["--bandwidth: is needed, for the profile does not say how fast KV travels"])
    if speed is None and measured.transfer is not None:
        speed = TransferSpeed(measured.transfer.bytes_per_s, measured.transfer.latency_s)
    assert speed is not None, measured
    return Setup(
        pools=[make_pool(spec, role, profiles[role], block_size) for role in ROLES],
        policy=policy,
        speed=speed,
        kv_bytes_per_token=measured.kv_bytes_per_token,
        placement=placement_config(spec.router),
        ttft_s=spec.router.slo.ttft_s,
        tpot_s=spec.router.slo.tpot_s,
        num_routers=num_routers or spec.router.workers,
        lease_s=spec.transfer.lease_s,
    )


def make_pool(spec: ClusterSpec, role: Role, profile: StepProfile, block_size: int | None = None) -> PoolSetup:
    """A worker of several GPUs has the KV memory of the spec on each of them."""
    measured = profile.measured
    pool = spec.pool(role, profiled_device(measured.device))
    size = block_size or max(pool.block_size, MIN_BLOCK_SIZE)
    if TRACE_BLOCK % size:
        raise SpecError([f"--block-size: {size} is not allowed: blocks of a trace have 512 tokens; allowed: a divisor"])
    num_tokens = _kv_tokens(pool, profile)
    if num_tokens < size:
        raise SpecError([f"{role}: kv_cache holds {num_tokens} tokens: less than one block of {size}"])
    config = SchedulerConfig(max_batch_tokens=pool.max_batch_tokens, max_num_seqs=pool.max_num_seqs)
    seconds: StepSeconds = profile.step_seconds
    return PoolSetup(
        role,
        pool.replicas,
        num_tokens // size,
        size,
        config,
        seconds,
        measured.tensor_parallel,
        spec.max_model_len,
    )


def _kv_tokens(pool: PoolSettings, profile: StepProfile) -> int:
    if pool.num_blocks is not None:
        return pool.num_blocks * pool.block_size * profile.measured.tensor_parallel
    num_tokens = profile.kv_tokens(pool.kv_memory)
    if num_tokens is None:
        raise SpecError(
            [
                "kv_cache.memory: must be set, as the profile does not say what a worker's GPU has left for it; "
                "allowed: a size such as 100GiB, or kv_cache.num_blocks"
            ]
        )
    return num_tokens
