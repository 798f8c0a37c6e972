"""The policy and the limits that a spec's router gets."""

from typing import Any

import pytest

from cluster.routing import make_policy, placement_config
from cluster.spec import RouterSpec
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import ANSWER_PRICE, PrefixAware


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ANSWER_PRICE),
        ({"answer_price": 0.7}, 0.7),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.02}}, 0.5),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.001}}, 1.0),
        ({"slo": {"ttft_s": 2.0}}, ANSWER_PRICE),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.02}, "answer_price": 0.1}, 0.1),
    ],
)
def test_a_second_of_an_answer_is_priced_as_the_spec_or_its_limits_say(fields: dict[str, Any], expected: float) -> None:
    policy = make_policy(RouterSpec.model_validate(fields))
    assert isinstance(policy, PrefixAware)
    assert policy.answer_price == pytest.approx(expected)


def test_what_local_prefill_may_take_is_the_specs() -> None:
    assert make_policy(RouterSpec(local_prefill_max_tokens=7)) == PrefixAware(7)


def test_how_many_may_wait_and_run_is_the_specs() -> None:
    limits = placement_config(RouterSpec(max_queue=7, max_running=3))
    assert limits == PlacementConfig(AdmissionConfig(max_queue=7, max_running=3))
