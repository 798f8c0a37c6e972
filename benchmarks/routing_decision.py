"""Time of one routing decision, and the router's CPU for one request, over a growing number of workers.

A decision is PrefixAware.choose over tables that are up to date. The CPU of a request is all that Placement does for
it: queue, index lookup, decision, the rows of workers that have reported meanwhile; the prompt's hashes are given.
Times are CPU time of the thread. Half of the workers prefill, half decode. Prompts begin with one of a few shared
prefixes; each worker holds two of them, whole or (--ragged) up to a random block.

    python -m benchmarks.routing_decision --help
"""

import argparse
import random
import time
from collections.abc import Sequence

import numpy as np

from benchmarks._arguments import positive
from protos import worker_pb2 as pb
from router.block_table import Hashes
from router.cluster_view import DECODE, PREFILL, WorkerState
from router.compiled import Floats
from router.placement import Placed, Placement, PlacementConfig
from router.policies import PrefixAware, RequestFacts
from router.worker_table import WorkerTable

BLOCK_SIZE = 16
PREFIX_BLOCKS = 400
NUM_PREFIXES = 32
NUM_BLOCKS = 30_000


class TimedPolicy:
    """PrefixAware with the time of each decision."""

    uses_hits = True

    def __init__(self) -> None:
        self.policy = PrefixAware()
        self.seconds: list[float] = []

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> object:
        start = time.thread_time()
        decision = self.policy.choose(facts, hits, table)
        self.seconds.append(time.thread_time() - start)
        return decision


class Prompt:
    reusable = True

    def __init__(self, facts: RequestFacts, hashes: Sequence[int]) -> None:
        self._facts, self._hashes = facts, np.array(hashes, np.uint64)

    def facts(self) -> RequestFacts:
        return self._facts

    def hashes(self, _block_size: int) -> Hashes:
        return self._hashes


def report(state: WorkerState, rng: random.Random) -> None:
    is_decode = state.description.role == DECODE
    state.report(
        pb.Load(
            num_running=rng.randrange(20, 100) if is_decode else 1,
            num_free_blocks=rng.randrange(5_000, 15_000),
            queue_us=0 if is_decode else rng.randrange(2_000_000),
            model=pb.StepModel(
                base_s=0.004, prefill_token_s=2e-5, pair_s=1e-9, decode_s=rng.uniform(2e-5, 3e-5), kv_token_s=3e-8
            ),
        )
    )


def measure(num_workers: int, num_requests: int, num_tokens: int, num_reports: int, *, ragged: bool) -> None:
    rng = random.Random(0)
    policy = TimedPolicy()
    placement: Placement[Prompt] = Placement(policy, PlacementConfig(), time.monotonic)  # type: ignore[arg-type]
    prefixes = [[rng.getrandbits(63) for _ in range(PREFIX_BLOCKS)] for _ in range(NUM_PREFIXES)]
    states = []
    for number in range(num_workers):
        described = pb.Description(
            role=PREFILL if number % 2 else DECODE,
            fingerprint="f",
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_model_len=100_000,
            max_batch_tokens=8192,
            max_num_seqs=256,
        )
        ends = [rng.randrange(PREFIX_BLOCKS) if ragged else PREFIX_BLOCKS for _ in range(2)]
        held = [prefix[:end] for prefix, end in zip(rng.sample(prefixes, 2), ends, strict=True)]
        states.append(placement.attach(f"w{number}", described, [each for part in held for each in part]))
        report(states[-1], rng)
    requests_s = []
    for number in range(num_requests):
        for state in rng.sample(states, min(num_workers, num_reports)):
            report(state, rng)
        tail = [rng.getrandbits(63) for _ in range(num_tokens // BLOCK_SIZE - PREFIX_BLOCKS)]
        prompt = Prompt(RequestFacts(num_tokens, 500), rng.choice(prefixes) + tail)
        start = time.thread_time()
        placement.add(prompt)
        for outcome in placement.pump():
            assert isinstance(outcome, Placed), outcome
            workers = [outcome.decode]
            outcome.decode.reserve(number, outcome.on_decode)
            if outcome.prefill is not None:
                workers.append(outcome.prefill)
                outcome.prefill.reserve(number, outcome.on_prefill)
        requests_s.append(time.thread_time() - start)
        for worker in workers:
            worker.counted(number)
        placement.release(prompt, 200)
    decisions, requests = (np.percentile(each, [50, 99]) * 1e6 for each in (policy.seconds, requests_s))
    print(
        f"{num_workers} workers: a decision takes {decisions[0]:.0f} us at p50 and {decisions[1]:.0f} us at p99; "
        f"CPU of a request {requests[0]:.0f} us at p50, {np.mean(requests_s) * 1e6:.0f} us on average",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=positive, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--requests", type=positive, default=3000)
    parser.add_argument("--tokens", type=positive, default=12_000, help="of a prompt")
    parser.add_argument("--reports", type=int, default=10, help="workers that report between two requests")
    parser.add_argument("--ragged", action="store_true", help="every worker holds another part of a prefix")
    options = parser.parse_args()
    for num_workers in options.workers:
        measure(num_workers, options.requests, options.tokens, options.reports, ragged=options.ragged)


if __name__ == "__main__":
    main()
