"""The timing model, and what the simulated executor promises beyond the contract."""

from dataclasses import replace

import pytest

from engine.executors.base import Batch, Chunk, SampleSpec
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor, step_seconds
from engine.request import RequestId, SamplingParams
from engine.step_profile import DecodeStep, Measurements, PrefillStep, StepProfile
from tests.fakes import FakeClock

CONFIG = SimulatedConfig(
    prefill_tokens_per_s=1000.0,
    step_base_s=0.01,
    decode_s_per_sequence=0.002,
    kv_read_tokens_per_s=10_000.0,
    block_size=4,
    num_blocks=32,
)


def chunk(num_tokens: int, start: int = 0, *, banned: tuple[int, ...] = ()) -> Chunk:
    token_ids = list(range(300, 300 + start + num_tokens))
    spec = SampleSpec(SamplingParams(), 0, token_ids, len(token_ids), banned)
    return Chunk(RequestId("a"), token_ids[start:], start, list(range(32)), spec)


def tokens(config: SimulatedConfig, *, banned: tuple[int, ...] = ()) -> list[int]:
    executor = SimulatedExecutor(config, lambda _seconds: None)
    sampled = [executor.submit(Batch([chunk(n, banned=banned)])).result().sampled[0] for n in range(1, 101)]
    executor.close()
    return [each.token_id for each in sampled if each is not None]


def test_a_step_takes_its_base_its_prompt_tokens_its_decodes_and_the_kv_read() -> None:
    assert step_seconds(CONFIG, Batch([chunk(50)])) == pytest.approx(0.01 + 0.05)
    assert step_seconds(CONFIG, Batch([chunk(1, 100), chunk(1, 20)])) == pytest.approx(0.01 + 0.004 + 0.012)
    assert step_seconds(CONFIG, Batch([chunk(10, 40), chunk(1, 20)])) == pytest.approx(0.01 + 0.01 + 0.002 + 0.006)


def test_with_a_profile_a_step_takes_what_was_measured() -> None:
    measured = Measurements(
        device="a device",
        model="a model",
        kv_bytes_per_token=8,
        commands=["by hand"],
        prefill=[PrefillStep(tokens=10, past=0, seconds=0.5), PrefillStep(tokens=50, past=0, seconds=0.9)],
        decode=[DecodeStep(batch=2, context=60, seconds=0.3)],
    )
    config = replace(CONFIG, profile=StepProfile(measured))
    assert step_seconds(config, Batch([chunk(10), chunk(20)])) == pytest.approx(0.7)
    assert step_seconds(config, Batch([chunk(1, 100), chunk(1, 20)])) == pytest.approx(0.3)


def test_a_step_lets_exactly_that_time_pass_before_its_kv_is_announced() -> None:
    clock = FakeClock(0.0)
    executor = SimulatedExecutor(CONFIG, clock.sleep)
    announced: list[float] = []
    executor.submit(Batch([chunk(50)]), lambda _group: announced.append(clock.now)).result()
    assert announced == [clock.now] == [pytest.approx(0.06)]
    executor.close()


def test_of_two_steps_in_flight_the_second_begins_when_the_first_ends() -> None:
    clock = FakeClock(0.0)
    executor = SimulatedExecutor(CONFIG, clock.sleep, clock)
    assert executor.max_in_flight == 2
    announced: list[float] = []
    first = executor.submit(Batch([chunk(50)]), lambda _group: announced.append(clock.now))
    later = replace(chunk(1, 50), token_ids=(0,), follows=0)
    second = executor.submit(Batch([later]), lambda _group: announced.append(clock.now))
    assert (clock.now, announced) == (0.0, [])
    first.result()
    clock.sleep(0.001)  # the caller's own work, while the second one is computed
    second.result()
    assert announced == pytest.approx([0.06, 0.06 + 0.01 + 0.002 + 0.005])
    clock.sleep(1.0)  # then nothing is in flight
    executor.submit(Batch([chunk(50)])).result()
    assert clock.now == pytest.approx(1.077 + 0.06)
    executor.close()


@pytest.mark.parametrize("clock", [None, FakeClock()])
def test_a_token_that_follows_another_in_flight_is_that_of_steps_one_by_one(clock: FakeClock | None) -> None:
    known = SimulatedExecutor(CONFIG, lambda _seconds: None)
    prompt = chunk(20)
    one = known.submit(Batch([prompt])).result().sampled[0]
    assert one is not None
    two = known.submit(Batch([replace(chunk(1, 20), token_ids=[one.token_id])])).result().sampled[0]
    known.close()
    executor = SimulatedExecutor(CONFIG, lambda _seconds: None, clock)
    steps = [executor.submit(Batch([each])) for each in (prompt, replace(chunk(1, 20), token_ids=(0,), follows=0))]
    assert [step.result().sampled[0] for step in steps] == [one, two]
    executor.close()


def test_tokens_stay_in_the_configured_range_and_end_tokens_come_only_where_configured() -> None:
    config = SimulatedConfig(vocab_size=120, first_token_id=100, num_blocks=32)
    assert set(tokens(config)) <= set(range(100, 120))
    executor = SimulatedExecutor(config, lambda _seconds: None)
    assert executor.eos_token_ids == ()
    executor.close()


def test_with_all_but_one_token_banned_that_one_comes() -> None:
    config = SimulatedConfig(vocab_size=110, first_token_id=100, num_blocks=32)
    banned = tuple(token_id for token_id in range(100, 110) if token_id != 103)
    assert set(tokens(config, banned=banned)) == {103}


def test_a_range_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="first_token_id"):
        SimulatedConfig(vocab_size=100, first_token_id=100)


@pytest.mark.parametrize("half", ["keys", "values"])
def test_a_wrong_block_gives_wrong_tokens(half: str) -> None:
    """Keys of the last positions are read for every token, values of all positions by turns."""
    executor = SimulatedExecutor(CONFIG, lambda _seconds: None)
    executor.submit(Batch([chunk(100)])).result()
    right = [next_token(executor, num_tokens) for num_tokens in range(100, 128)]
    for block in range(25) if half == "values" else (23, 24):
        executor.submit(Batch([chunk(100)])).result()
        piece = executor.memory.block(block)[:16] if half == "keys" else executor.memory.block(block)[16:]
        piece[:] = bytes(16)
        assert [next_token(executor, num_tokens) for num_tokens in range(100, 128)] != right, block
    executor.close()


def next_token(executor: SimulatedExecutor, num_tokens: int) -> int:
    sampled = executor.submit(Batch([chunk(1, num_tokens - 1)])).result().sampled[0]
    assert sampled is not None
    return sampled.token_id
