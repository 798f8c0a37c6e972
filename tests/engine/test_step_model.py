import random

import pytest

from engine.step_model import MIN_STEPS, Calibration, StepModel, StepWork, chunks_work, num_pairs

TRUTH = StepModel(base_s=0.004, prefill_token_s=21e-6, pair_s=1e-9, decode_s=26e-6, kv_token_s=3e-8)


def random_work(rng: random.Random) -> StepWork:
    decodes = rng.randrange(0, 200)
    tokens = rng.choice((0, 0, rng.randrange(2, 8000)))
    return StepWork(tokens, num_pairs(tokens, rng.randrange(0, 30_000)), decodes, decodes * rng.randrange(50, 8000))


def prompt(num_tokens: int, past: int) -> StepWork:
    return StepWork(num_tokens, num_pairs(num_tokens, past))


def test_pairs_are_those_of_a_causal_mask() -> None:
    for num_tokens in range(1, 6):
        for past in range(5):
            assert num_pairs(num_tokens, past) == sum(past + i + 1 for i in range(num_tokens))


def test_chunks_of_one_token_decode_and_the_others_prefill() -> None:
    assert chunks_work([(100, 1), (0, 3), (4, 2), (7, 1)]) == StepWork(5, 6 + 11, 2, 107)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_predicts_steps_it_has_not_seen(seed: int) -> None:
    rng = random.Random(seed)
    calibration = Calibration()
    for _ in range(2000):
        work = random_work(rng)
        calibration.observe(work, TRUTH.seconds(work) * rng.uniform(0.97, 1.03))
    for _ in range(40):  # as a worker does, which asks now and then
        model = calibration.fit()
    assert model is not None
    for _ in range(100):
        work = random_work(rng)
        assert model.seconds(work) == pytest.approx(TRUTH.seconds(work), rel=0.05)


def test_a_pause_of_the_process_changes_little() -> None:
    rng = random.Random(1)
    calibration = Calibration()
    for i in range(1000):
        work = random_work(rng)
        calibration.observe(work, TRUTH.seconds(work) + (30.0 if i % 100 == 50 else 0.0))
    for _ in range(40):
        model = calibration.fit()
    assert model is not None
    assert model.seconds(prompt(4000, 8000)) == pytest.approx(TRUTH.seconds(prompt(4000, 8000)), rel=0.05)


def test_a_fit_follows_a_worker_that_has_become_slower() -> None:
    rng = random.Random(2)
    calibration = Calibration()
    for factor in (1.0, 3.0):
        for _ in range(5000):
            work = random_work(rng)
            calibration.observe(work, factor * TRUTH.seconds(work))
        for _ in range(40):
            model = calibration.fit()
        assert model is not None
        assert model.seconds(prompt(4000, 0)) == pytest.approx(factor * TRUTH.seconds(prompt(4000, 0)), rel=0.1)


def test_nothing_is_said_of_a_worker_that_has_hardly_run_and_nothing_negative_of_a_strange_one() -> None:
    calibration = Calibration()
    for i in range(MIN_STEPS):
        assert calibration.fit() is None
        calibration.observe(StepWork(10 * i, 0, 1, 0), 0.1 - i * 0.005)  # more work, less time
    model = calibration.fit()
    assert model is not None
    assert min(model.base_s, model.prefill_token_s, model.decode_s) >= 0.0
    assert model.pair_s == model.kv_token_s == 0.0
