"""Times between the measured ones: right for a worker whose times are known, never falling, and fast."""

import json
import random
import timeit
from pathlib import Path

import msgspec
import pytest

from engine.step_model import StepModel, StepWork, num_pairs
from engine.step_profile import DecodeStep, Measurements, MixedStep, PrefillStep, StepProfile

TRUTH = StepModel(base_s=0.004, prefill_token_s=21e-6, pair_s=1e-9, decode_s=26e-6, kv_token_s=3e-8)
TOKENS, PASTS = (16, 128, 1024, 8192), (0, 2048, 16384)
BATCHES, CONTEXTS = (1, 8, 64, 256), (128, 1024, 8192)


def prefill_step(tokens: int, past: int, noise: float = 1.0, prompts: int = 1) -> PrefillStep:
    work = StepWork(prompts * tokens, prompts * num_pairs(tokens, past))
    return PrefillStep(tokens=tokens, past=past, prompts=prompts, seconds=TRUTH.seconds(work) * noise)


def decode_step(batch: int, context: int, noise: float = 1.0) -> DecodeStep:
    seconds = TRUTH.seconds(StepWork(decodes=batch, kv_tokens=batch * context)) * noise
    return DecodeStep(batch=batch, context=context, seconds=seconds)


def measured(noise: float = 0.0, mixed: tuple[MixedStep, ...] = ()) -> Measurements:
    rng = random.Random(0)

    def off() -> float:
        return 1.0 + rng.uniform(-noise, noise)

    return Measurements(
        device="a device",
        model="a model",
        kv_bytes_per_token=1024,
        commands=["by hand"],
        prefill=[prefill_step(tokens, past, off()) for tokens in TOKENS for past in PASTS],
        decode=[decode_step(batch, context, off()) for batch in BATCHES for context in CONTEXTS],
        mixed=list(mixed),
    )


def decoding(batch: int, context: int) -> StepWork:
    return StepWork(decodes=batch, kv_tokens=batch * context)


@pytest.mark.parametrize(
    "work",
    [
        *(
            StepWork(tokens, num_pairs(tokens, past))
            for tokens in (16, 77, 500, 3000, 12_000)
            for past in (0, 900, 50_000)
        ),
        *(decoding(batch, context) for batch in (1, 3, 20, 200, 400) for context in (0, 300, 20_000)),
        StepWork(512, 8 * num_pairs(64, 0)),  # eight prompts share the step
    ],
)
def test_steps_that_were_not_measured_take_the_time_of_the_worker_measured(work: StepWork) -> None:
    assert StepProfile(measured()).step_seconds(work) == pytest.approx(TRUTH.seconds(work), rel=1e-6)


@pytest.mark.parametrize("work", [decoding(20, 4000), StepWork(3000, num_pairs(3000, 1000))])
def test_noise_of_single_measurements_is_averaged(work: StepWork) -> None:
    assert StepProfile(measured(noise=0.05)).step_seconds(work) == pytest.approx(TRUTH.seconds(work), rel=0.05)


def test_a_step_with_nothing_to_compute_takes_no_time() -> None:
    assert StepProfile(measured()).step_seconds(StepWork()) == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.3])
def test_mixed_steps_weigh_the_reading_of_decodes_as_the_measured_ones_do(weight: float) -> None:
    def seconds(tokens: int, batch: int, context: int) -> float:
        """A decode's row costs what a prompt's does, and reads with the weight."""
        prompt = StepWork(tokens + batch, num_pairs(tokens, 0))
        return TRUTH.seconds(prompt) + weight * TRUTH.kv_token_s * batch * context

    steps = [
        MixedStep(
            decode_batch=batch,
            decode_context=1000,
            prefill_tokens=tokens,
            prefill_past=0,
            seconds=seconds(tokens, batch, 1000),
        )
        for tokens in (256, 1024)
        for batch in (16, 64)
    ]
    profile = StepProfile(measured(mixed=tuple(steps)))
    for tokens, batch, context in ((600, 32, 2000), (2000, 8, 500)):
        work = StepWork(tokens, num_pairs(tokens, 0), batch, batch * context)
        assert profile.step_seconds(work) == pytest.approx(seconds(tokens, batch, context), rel=1e-6)


def test_a_mixed_step_is_never_faster_than_its_decodes_alone() -> None:
    work = StepWork(2, num_pairs(2, 0), 256, 256 * 8192)
    still = MixedStep(decode_batch=256, decode_context=8192, prefill_tokens=16, prefill_past=0, seconds=1e-6)
    profile = StepProfile(measured(mixed=(still,)))
    assert profile.step_seconds(work) >= profile.step_seconds(decoding(256, 8192))


@pytest.mark.parametrize("seed", range(3))
def test_more_work_never_takes_less_time_however_noisy_the_measurements(seed: int) -> None:
    rng = random.Random(seed)
    profile = StepProfile(measured(noise=0.5))

    def seconds(tokens: int, past: int, batch: int, context: int) -> float:
        # The mean number of keys each token reads is what grows: `past` stands for it.
        return profile.step_seconds(StepWork(tokens, tokens * past, batch, batch * context))

    for _ in range(3000):
        sizes = [rng.randrange(1, 10_000), rng.randrange(20_000), rng.randrange(1, 300), rng.randrange(20_000)]
        more = list(sizes)
        place = rng.randrange(4)
        more[place] += rng.randrange(1, 5000)
        if rng.random() < 0.5:
            sizes[0] = more[0] = 0
        elif rng.random() < 0.5:
            sizes[2] = more[2] = 0
        assert seconds(*more) >= seconds(*sizes) * (1 - 1e-12), (sizes, more)


def test_one_measurement_of_each_kind_is_enough_for_an_answer() -> None:
    profile = StepProfile(
        msgspec.structs.replace(measured(), prefill=[prefill_step(64, 0)], decode=[decode_step(4, 100)])
    )
    assert profile.step_seconds(StepWork(64, num_pairs(64, 0))) == pytest.approx(prefill_step(64, 0).seconds)
    assert profile.step_seconds(decoding(4, 100)) == pytest.approx(decode_step(4, 100).seconds)
    assert profile.step_seconds(decoding(9, 100)) >= profile.step_seconds(decoding(4, 100))


def test_what_is_written_is_read_again() -> None:
    mixed = MixedStep(decode_batch=4, decode_context=10, prefill_tokens=64, prefill_past=0, seconds=0.01)
    written = measured(mixed=(mixed,))
    assert StepProfile.from_json(written.to_json()).measured == written
    assert json.loads(written.to_json())["prefill"][0]["tokens"] == TOKENS[0]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("decode", [], "length >= 1 - at `$.decode`"),
        ("prefill", [{"tokens": 16, "past": 0}], "missing required field `seconds` - at `$.prefill[0]`"),
        ("prefill", [{"tokens": 16, "past": 0, "seconds": 0}], "> 0.0 - at `$.prefill[0].seconds`"),
        ("kv_bytes_per_token", "many", "got `str` - at `$.kv_bytes_per_token`"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, field: str, value: object, problem: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(json.loads(measured().to_json()) | {field: value}))
    with pytest.raises(ValueError, match="is no step profile") as error:
        StepProfile.load(file)
    assert str(file) in str(error.value)
    assert problem in str(error.value)


def test_a_time_costs_microseconds() -> None:
    """Under 3 us when the machine is quiet, which a test cannot ask for."""
    profile, work = StepProfile(measured()), StepWork(500, 100_000, 60, 100_000)
    assert min(timeit.repeat(lambda: profile.step_seconds(work), number=1000, repeat=5)) / 1000 < 20e-6
