"""The policy and the limits that a spec's router gets."""

from typing import Any

import pytest

from cluster.routing import make_policy, placement_config
from cluster.spec import RouterSpec, SloSpec
from router.admission import AdmissionConfig
from router.placement import PlacementConfig
from router.policies import ANSWER_PRICE, PrefixAware


@pytest.mark.parametrize(
    ("fields", "price", "tpot_s"),
    [
        ({}, ANSWER_PRICE, 0.05),
        ({"answer_price": 0.7}, 0.7, 0.05),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.02}}, 0.5, 0.02),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.001}}, 1.0, 0.001),
        ({"slo": {"ttft_s": 2.0}}, ANSWER_PRICE, 0.05),
        ({"slo": {"ttft_s": 2.0, "tpot_s": 0.02}, "answer_price": 0.1}, 0.1, 0.02),
    ],
)
def test_a_second_of_an_answer_is_priced_as_the_spec_or_its_limits_say(
    fields: dict[str, Any], price: float, tpot_s: float
) -> None:
    router = RouterSpec.model_validate(fields)
    assert make_policy(router) == PrefixAware(None, pytest.approx(price), tpot_s)
    other = SloSpec(ttft_s=2.0, tpot_s=0.04)
    assert make_policy(router, other) == PrefixAware(None, pytest.approx(router.answer_price or 0.25), 0.04)


def test_what_local_prefill_may_take_is_the_specs() -> None:
    assert make_policy(RouterSpec(local_prefill_max_tokens=7)) == PrefixAware(7)


def test_how_many_may_wait_and_run_is_the_specs() -> None:
    limits = placement_config(RouterSpec(max_queue=7, max_running=3))
    assert limits == PlacementConfig(AdmissionConfig(max_queue=7, max_running=3))
