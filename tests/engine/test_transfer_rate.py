import pytest

from decode_workers.transfer_rate import TransferRate


def test_the_rate_is_that_of_the_last_pulls():
    rate = TransferRate()
    assert rate.token_s(1000.0, pulling=False) == 0.0
    for number in range(200):
        rate.observe(1000, 1e-3, 1000.0 + 0.01 * number)
    assert rate.token_s(1002.0, pulling=False) == pytest.approx(1e-6, rel=0.01)
    for number in range(200):
        rate.observe(1000, 5e-3, 1002.0 + 0.01 * number)
    assert rate.token_s(1004.0, pulling=False) == pytest.approx(5e-6, rel=0.05)


@pytest.mark.parametrize("reports_while_pulling", [0, 1, 5])
def test_a_link_that_was_slow_once_is_tried_again_and_then_taken_for_what_it_is(reports_while_pulling: int):
    rate = TransferRate()
    rate.observe(500, 0.5, 1000.0)
    assert rate.token_s(1000.0, pulling=False) == pytest.approx(1e-3)
    assert rate.token_s(1180.0, pulling=False) < 2e-5
    for _ in range(reports_while_pulling):
        assert rate.token_s(1180.0, pulling=True) < 2e-5
    rate.observe(1000, 3e-3, 1180.0)
    assert rate.token_s(1180.0, pulling=False) < 2e-5
    rate.observe(1000, 3e-3, 1181.0)
    rate.observe(1000, 3e-3, 1182.0)
    assert rate.token_s(1182.0, pulling=False) < 7e-6


def test_a_long_pull_is_no_pause():
    rate = TransferRate()
    rate.observe(500, 0.5, 1000.0)
    for second in range(60):
        assert rate.token_s(1000.0 + second, pulling=True) == pytest.approx(1e-3)
