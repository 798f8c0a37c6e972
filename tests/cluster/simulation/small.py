"""Small simulated clusters whose step times are round numbers."""

from collections.abc import Callable, Sequence
from random import Random

from cluster.simulation.simulation import PoolSetup, Setup
from cluster.simulation.trace import Trace, TraceRequest
from cluster.simulation.transfer import TransferSpeed
from engine.scheduler import SchedulerConfig
from engine.step_model import StepModel
from router.placement import PlacementConfig
from router.policies import PrefixAware, RoutingPolicy

BLOCK = 128
NETWORK_S = 0.001
LATENCY_S = 0.002
BYTES_PER_S = 1e9
KV_BYTES = 1000  # per token: 1 us of transfer
# A prompt of n tokens takes 10 ms + n * 0.1 ms, a decode step 10 ms + 1 ms a sequence.
MODEL = StepModel(base_s=0.01, prefill_token_s=1e-4, pair_s=0.0, decode_s=0.001, kv_token_s=0.0)


def make_setup(
    num_prefill: int = 1,
    num_decode: int = 1,
    *,
    policy: Callable[[], RoutingPolicy] = lambda: PrefixAware(local_prefill_max_tokens=0),
    num_blocks: int = 64,
    max_batch_tokens: int = 1024,
    max_num_seqs: int = 8,
    num_routers: int = 1,
    lease_s: float = 30.0,
) -> Setup:
    config = SchedulerConfig(max_batch_tokens, max_num_seqs)
    counts = (("prefill", num_prefill), ("decode", num_decode))
    return Setup(
        [PoolSetup(role, count, num_blocks, BLOCK, config, MODEL.seconds) for role, count in counts],
        policy,
        TransferSpeed(BYTES_PER_S, LATENCY_S),
        KV_BYTES,
        PlacementConfig(),
        num_routers=num_routers,
        network_s=NETWORK_S,
        lease_s=lease_s,
    )


def request(
    number: int, arrived: float = 0.0, num_prompt: int = 100, num_output: int = 3, contents: Sequence[int] = ()
) -> TraceRequest:
    """Without `contents`, it has nothing in common with others."""
    num_blocks = -(-(num_prompt + num_output) // 512)
    own = [1000 * (number + 1) + block for block in range(num_blocks)]
    return TraceRequest(number, arrived, num_prompt, num_output, (*contents, *own[len(contents) :]))


def trace_of(*requests: TraceRequest) -> Trace:
    return Trace("small", requests)


def random_trace(seed: int, num_requests: int = 120, seconds: float = 10.0) -> Trace:
    """Conversations that share up to three blocks of the trace."""
    random = Random(seed)
    requests: list[TraceRequest] = []
    for number, arrived in enumerate(sorted(random.uniform(0, seconds) for _ in range(num_requests))):
        topic = random.randrange(6)
        contents = [10 * topic + block for block in range(random.randrange(4))]
        num_prompt = 512 * len(contents) + random.randrange(1, 700)
        requests.append(request(number, arrived, num_prompt, random.randrange(1, 60), contents))
    return trace_of(*requests)
