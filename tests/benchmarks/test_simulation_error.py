"""What the comparison of simulator and cluster rests on: both get the same requests."""

from argparse import Namespace
from pathlib import Path

import pytest

from baton.step_profiles import load_profile
from benchmarks.simulation_error import make_spec, make_trace, prompt_ids, simulated
from cluster.simulation.trace import Trace
from engine.kv.block_hash import block_hashes

BLOCK_SIZE = 16


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return make_trace(tmp_path / "trace.jsonl", 30, rate=5.0, scale=0.5, seed=1)


def test_two_prompts_have_as_many_blocks_in_common_as_the_trace_says(trace: Trace) -> None:
    hashes = [
        block_hashes(prompt_ids(request.contents, request.num_prompt_tokens), BLOCK_SIZE, 0)
        for request in trace.requests
    ]
    names = [request.hashes(BLOCK_SIZE)[: request.num_prompt_tokens // BLOCK_SIZE] for request in trace.requests]
    shared = 0
    for i in range(len(names)):
        for j in range(i):
            common = sum(a == b for a, b in zip(names[i], names[j], strict=False))
            assert sum(a == b for a, b in zip(hashes[i], hashes[j], strict=False)) == common
            shared += common > 0
    assert shared > 0


def test_a_prompt_has_the_tokens_the_trace_says(trace: Trace) -> None:
    for request in trace.requests:
        assert len(prompt_ids(request.contents, request.num_prompt_tokens)) == request.num_prompt_tokens


def test_the_simulated_half_answers_every_request(trace: Trace, tmp_path: Path) -> None:
    args = Namespace(model=None, profile="h200-llama-3-8b", blocks=4096)
    profile = load_profile(args.profile)
    answers = simulated(make_spec(args, 2, tmp_path / "run"), profile, trace, seed=0)
    assert len(answers) == len(trace.requests)
    assert any(answer.cached_tokens for answer in answers)
    fastest = min(step.seconds for step in profile.measured.decode)
    assert all(answer.tpot > fastest for answer in answers)
