"""What a link carries at the same time, and what it does not."""

from cluster.simulation.transfer import Link, TransferSpeed, transfer_end

SPEED = TransferSpeed(bytes_per_s=1e9, latency_s=0.125)
SECOND = 10**9  # bytes


def test_a_link_carries_one_thing_after_the_other_at_either_end() -> None:
    links = [Link() for _ in range(4)]
    assert transfer_end(SECOND, 0.0, 0.25, links[0], links[1], SPEED) == 1.125
    assert transfer_end(SECOND, 0.5, 0.75, links[0], links[2], SPEED) == 2.125  # the same source
    assert transfer_end(SECOND, 0.5, 0.75, links[3], links[2], SPEED) == 2.625  # the same sink, until 1.5
    assert transfer_end(SECOND, 5.0, 5.25, links[0], links[1], SPEED) == 6.125  # nobody is before it
    assert [link.take_busy() for link in links] == [3.0, 2.0, 2.0, 1.0]
    assert [link.take_busy() for link in links] == [0.0] * 4


def test_the_last_sixteenth_of_the_layers_travels_when_the_step_has_ended() -> None:
    assert transfer_end(SECOND, 0.0, 10.0, Link(), Link(), SPEED) == 10.1875
