"""`baton profile`: what a worker's steps take is what the profile says, over sizes that the worker can run."""

from itertools import product
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.cli import app
from baton.compose import found_pool
from baton.profile_command import profile_worker
from baton.step_timer import choose_sizes, measure, powers
from cluster.spec_file import parse_spec
from engine.executors.base import Batch
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor, SimulatedStep
from engine.step_model import StepWork, num_pairs
from engine.step_profile import StepProfile
from tests.checkpoints import make_checkpoint
from tests.fakes import FakeClock

CONFIG = SimulatedConfig(
    prefill_tokens_per_s=10_000.0,
    step_base_s=0.002,
    decode_s_per_sequence=0.0001,
    kv_read_tokens_per_s=1e6,
    max_model_len=1024,
    num_blocks=256,
)


class Watched(SimulatedExecutor):
    """Remembers its batches."""

    def __init__(self, config: SimulatedConfig, clock: FakeClock) -> None:
        super().__init__(config, clock.sleep)
        self.batches: list[Batch] = []

    def submit(self, batch: Batch, on_group_done: object = None) -> SimulatedStep:  # noqa: ARG002
        self.batches.append(batch)
        return super().submit(batch)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(0.0)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_times_measured_are_those_of_the_executor(clock: FakeClock, max_in_flight: int) -> None:
    executor = SimulatedExecutor(CONFIG, clock.sleep, clock if max_in_flight == 2 else None)
    sizes = choose_sizes(executor, 256, 8, quick=False)
    steps = measure(executor, sizes, clock, lambda _step: None, step_s=0.1)
    executor.close()
    for step in steps.decode:
        expected = 0.002 + 0.0001 * step.batch + step.batch * step.context / 1e6
        assert step.seconds == pytest.approx(expected, rel=1e-3)
    for prompt in steps.prefill:
        expected = 0.002 + prompt.prompts * (prompt.tokens / 10_000 + prompt.past / 1e6)
        assert prompt.seconds == pytest.approx(expected, rel=1e-3)
    assert len(steps.prefill) + len(steps.decode) + len(steps.mixed) == sizes.num


@pytest.mark.parametrize("quick", [False, True])
def test_every_kind_is_measured_and_each_step_fits_the_limits_and_the_pool(clock: FakeClock, quick: bool) -> None:
    executor = Watched(CONFIG, clock)
    sizes = choose_sizes(executor, 128, 16, quick=quick)
    assert sizes.prefill
    assert sizes.decode
    assert sizes.mixed
    told: list[str] = []
    measure(executor, sizes, clock, told.append, step_s=0.01)
    executor.close()
    assert len(told) == sizes.num
    for batch in executor.batches:
        assert batch.num_tokens <= 128
        assert len(batch.chunks) <= 16
        assert max(chunk.end for chunk in batch.chunks) <= CONFIG.max_model_len
        blocks = [block for chunk in batch.chunks for block in chunk.block_ids]
        assert len(blocks) == len(set(blocks))
        assert set(blocks) <= set(range(CONFIG.num_blocks))


def test_the_largest_sizes_are_among_those_measured(clock: FakeClock) -> None:
    executor = SimulatedExecutor(CONFIG, clock.sleep)
    sizes = choose_sizes(executor, 200, 16, quick=True)
    executor.close()
    assert max(rows.tokens for rows in sizes.prefill) == 200
    assert max(rows.num for rows in sizes.decode) == 16
    assert max(rows.past for rows in sizes.decode) == 1023


@pytest.mark.parametrize(
    ("max_batch_tokens", "max_num_seqs", "max_model_len", "num_blocks", "quick"),
    [*product((1, 8, 512), (1,), (2, 64, 4096), (4, 300), (False, True)), (16384, 512, 163_840, 600_000, False)],
)
def test_any_limits_give_sizes(
    clock: FakeClock, max_batch_tokens: int, max_num_seqs: int, max_model_len: int, num_blocks: int, quick: bool
) -> None:
    config = SimulatedConfig(max_model_len=min(max_model_len, 16 * num_blocks), num_blocks=num_blocks)
    executor = SimulatedExecutor(config, clock.sleep)
    sizes = choose_sizes(executor, max_batch_tokens, max_num_seqs, quick=quick)
    executor.close()
    assert sizes.decode
    assert sizes.prefill
    assert len(set(sizes.prefill)) == len(sizes.prefill)
    assert sizes.num < 200


def test_powers_go_down_from_the_last() -> None:
    assert powers(16, 100, 2) == [25, 50, 100]
    assert powers(1, 64, 4) == [1, 4, 16, 64]
    assert powers(16, 15, 2) == []


def test_a_profile_of_a_model_on_the_cpu_predicts_its_steps(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", hidden_size=128, intermediate_size=512, tokenizer=False)
    spec = parse_spec(
        {
            "model": str(tmp_path / "model"),
            "device": "cpu",
            "max_model_len": 256,
            "scheduler": {"max_batch_tokens": 64, "max_num_seqs": 4},
            "kv_cache": {"num_blocks": 64},
        }
    )
    measured = profile_worker(spec, found_pool(spec, "decode"), Console(quiet=True), "a test", quick=True)
    profile = StepProfile(measured)
    assert measured.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert measured.kv_tokens == 64 * 16
    assert profile.step_seconds(StepWork(64, num_pairs(64, 0))) > profile.step_seconds(StepWork(decodes=1)) > 1e-5
    assert StepProfile.from_json(measured.to_json()).measured == measured


def test_the_command_writes_a_profile(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "model: tiny\nengine: simulated\nscheduler: {max_batch_tokens: 32, max_num_seqs: 2}\nmax_model_len: 128\n"
        "simulated: {step_base_s: 0.0001, kv_read_tokens_per_s: 1.0e+9}\nkv_cache: {num_blocks: 64}\n"
    )
    out = tmp_path / "profile.json"
    result = CliRunner().invoke(app, ["profile", str(spec), "--out", str(out), "--quick", "--role", "prefill"])
    assert result.exit_code == 0, result.output
    profile = StepProfile.load(out)
    assert profile.measured.device == "simulated"
    assert "--role prefill --quick" in profile.measured.commands[0]
    assert profile.step_seconds(StepWork(32, num_pairs(32, 0))) >= 32 / 20_000


@pytest.mark.parametrize(("option", "value"), [("--role", "router"), ("--out", "/nowhere/at/all.json")])
def test_wrong_usage_is_refused_before_a_model_is_loaded(tmp_path: Path, option: str, value: str) -> None:
    options = {"--out": str(tmp_path / "profile.json"), option: value}
    arguments = [word for pair in options.items() for word in pair]
    result = CliRunner().invoke(app, ["profile", "no.yaml", *arguments])
    assert result.exit_code == 2
    assert option in result.output
