"""How far the simulator is off: the same small trace through a real local cluster and through the simulator.

Two kinds of real clusters, each started as `baton up` does. With `profile` workers (the default) a step waits for as
long as a step profile says, so that what differs is everything but the steps: queues, handoffs, the router, processes
and their messages. With `--model` workers the CPU computes a model, whose profile is measured first, as `baton profile`
does; then the workers, the router and the load generator share the cores, which the simulator knows nothing of.

Prompts share documents, so that prefix caches matter. ttft: from sending a request to its first token, by the client's
clock; router_ttft: from when the router had read it until it had the token, which is what the simulator simulates;
tpot: the mean gap between tokens, by the client. Figures are of all rounds together, each with other arrivals.

    python -m benchmarks.simulation_error
    python -m benchmarks.simulation_error --model auto --rate 3
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from baton.compose import found_pool
from baton.demo_model import demo_model
from baton.llm_remote import events, raise_for_error
from baton.profile_command import profile_worker
from baton.step_profiles import load_profile
from cluster.launcher import LocalCluster
from cluster.simulation.setup import make_setup, policy_maker
from cluster.simulation.simulation import Simulation
from cluster.simulation.trace import TRACE_BLOCK, Trace, TraceRequest, arrivals, load_trace
from cluster.simulation.transfer import TransferSpeed
from cluster.spec import ROLES, ClusterSpec, Role
from cluster.spec_file import parse_spec
from engine.step_profile import StepProfile

MODEL = "model"
NUM_WARM = 16  # requests before the first one that counts
WARM_ID = 1 << 40  # of their blocks: beyond the trace's
FIRST_ID, LAST_ID = 256, 6000  # token ids of prompts


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds."""

    ttft: float
    router_ttft: float  # from when the router had read the request
    tpot: float
    cached_tokens: int


def make_trace(path: Path, num_requests: int, rate: float, scale: float, seed: int) -> Trace:
    """In Mooncake's format. Half of the prompts begin with one of a few documents; `scale` multiplies all lengths."""
    rng = random.Random(seed)
    fresh = iter(range(1 << 30))
    documents = [[next(fresh) for _ in range(rng.randint(1, max(1, round(8 * scale))))] for _ in range(6)]
    now, lines = 0.0, []
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        shared = rng.choice(documents) if rng.random() < 0.5 else []
        own = max(16, round(rng.uniform(100, 4000) * scale))
        ids = [*shared, *(next(fresh) for _ in range(-(-own // TRACE_BLOCK)))]
        row = {
            "timestamp": 1e3 * now,
            "input_length": len(shared) * TRACE_BLOCK + own,
            "output_length": max(8, round(rng.uniform(20, 300) * scale)),
            "hash_ids": ids,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return load_trace(path)


def prompt_ids(contents: Sequence[int], num_tokens: int) -> list[int]:
    """Random token ids, the same for the same blocks of the trace."""
    ids: list[int] = []
    for block in contents[: -(-num_tokens // TRACE_BLOCK)]:
        ids += random.Random(block).choices(range(FIRST_ID, LAST_ID), k=TRACE_BLOCK)
    return ids[:num_tokens]


async def ask(client: httpx.AsyncClient, prompt: Sequence[int], num_output: int) -> Answer:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": num_output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = last = 0.0
    usage: Mapping[str, Any] = {}
    timeline: Mapping[str, Any] = {}
    headers = {"x-baton-timeline": "1"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        await raise_for_error(response)
        async for event in events(response):
            usage, timeline = event.get("usage") or usage, event.get("timeline") or timeline
            if event["choices"]:
                last = time.perf_counter()
                first = first or last
    assert usage["completion_tokens"] == num_output, (usage, num_output)
    cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(first - began, timeline["first_token"], (last - first) / (num_output - 1), cached_tokens)


async def real(spec: ClusterSpec, trace: Trace, seed: int) -> list[Answer]:
    """A fresh cluster's answers, after some requests that have nothing in common with the trace."""
    async with LocalCluster(spec) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=600) as client:
        for number in range(NUM_WARM):
            await ask(client, prompt_ids([WARM_ID + number], 300), 8)
        began = time.perf_counter()

        async def one(request: TraceRequest, arrived: float) -> Answer:
            prompt = prompt_ids(request.contents, request.num_prompt_tokens)
            await asyncio.sleep(began + arrived - time.perf_counter())
            return await ask(client, prompt, request.num_output_tokens)

        return await asyncio.gather(*map(one, trace.requests, arrivals(trace, seed)))


def make_spec(args: argparse.Namespace, num_workers: int, run_dir: Path) -> ClusterSpec:
    model: dict[str, Any] = {"model": str(demo_model()), "served_model_name": MODEL, "run_dir": str(run_dir)}
    if args.model:
        model["device"] = "cpu"
        if args.model != "auto":
            model["model"] = args.model
    else:
        # Every token has text, so the first one is seen when it is there.
        model |= {
            "engine": "simulated",
            "simulated": {"profile": args.profile, "vocab_size": LAST_ID},
            "scheduler": {"max_batch_tokens": 8192, "max_num_seqs": 256},
        }
    workers = {"replicas": num_workers}
    model["kv_cache"] = {"num_blocks": args.blocks}
    return parse_spec({**model, "prefill": workers, "decode": workers, "router": {"port": 0}})


def simulated(spec: ClusterSpec, profile: StepProfile, trace: Trace, seed: int) -> list[Answer]:
    """KV travels in no time: there is little of it, and it is moved while the next chunk is computed."""
    speed = TransferSpeed(float("inf"), 0.0)
    profiles: dict[Role, StepProfile] = dict.fromkeys(ROLES, profile)
    setup = make_setup(spec, profiles, policy=policy_maker(spec, None), speed=speed, block_size=spec.block_size)
    result = Simulation(setup, trace, seed=seed).run()
    answers = []
    for outcome in result.outcomes:
        assert outcome.ttft is not None, outcome
        assert outcome.tpot is not None, outcome
        answers.append(Answer(outcome.ttft, outcome.ttft, outcome.tpot, outcome.cached_tokens))
    return answers


def show(name: str, ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    """`ours` simulated, `theirs` measured."""
    for field in ("ttft", "router_ttft", "tpot", "cached_tokens"):
        unit, scale = ("", 1.0) if field == "cached_tokens" else ("ms", 1e3)
        values = [sorted(scale * getattr(answer, field) for answer in answers) for answers in (theirs, ours)]
        for label, pick in STATISTICS.items():
            measured, said = pick(values[0]), pick(values[1])
            if field != "cached_tokens" or label == "mean":
                error = f"{said / measured - 1:+7.1%}" if measured else "      -"
                print(f"{name:5} {field:13} {label:4}  {measured:9.2f}  {said:9.2f} {unit:2} {error}", flush=True)


STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "p50": statistics.median,
    "p90": lambda values: values[int(0.9 * len(values))],
    "mean": statistics.fmean,
}


async def compare(args: argparse.Namespace, scratch: Path) -> None:
    """One line for each figure."""
    profile = load_profile(args.profile)
    if args.model:
        spec = make_spec(args, 1, scratch / "none")
        console = Console(stderr=True)
        profile = StepProfile(
            profile_worker(spec, found_pool(spec, "decode"), console, "measured here", quick=args.quick)
        )
    print(f"steps of {profile.measured.device}, {profile.measured.model}")
    scale = args.scale or (0.15 if args.model else 1.0)
    for num_workers in args.workers:
        rate = (args.rate or (3.0 if args.model else 4.0)) * num_workers
        trace = make_trace(scratch / "trace.jsonl", args.requests, rate, scale, args.seed)
        mean = statistics.fmean(request.num_prompt_tokens for request in trace.requests)
        out = statistics.fmean(request.num_output_tokens for request in trace.requests)
        name = f"{num_workers}P{num_workers}D"
        print(f"{name}: {args.rounds} x {args.requests} requests, {rate:g}/s, {mean:.0f} tokens in, {out:.0f} out")
        print(f"{'':5} {'':13} {'':4}  {'measured':>9}  {'simulated':>9} {'':2}   error")
        ours: list[Answer] = []
        theirs: list[Answer] = []
        for seed in range(args.rounds):
            spec = make_spec(args, num_workers, scratch / f"{name}-{seed}")
            theirs += await real(spec, trace, seed)
            ours += simulated(spec, profile, trace, seed)
        show(name, ours, theirs)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h200-llama-3-8b", help="what steps wait for (default: %(default)s)")
    parser.add_argument("--model", help="compute this checkpoint on the CPU instead; auto: the demo's")
    parser.add_argument("--quick", action="store_true", help="measure the model's profile with fewer sizes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of each role")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, help="requests a second for each prefill worker")
    parser.add_argument("--scale", type=float, help="multiplies the lengths of prompts and answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4096, help="of KV, in each worker")
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(compare(parser.parse_args(), Path(scratch)))


if __name__ == "__main__":
    main()
