from random import Random

from kv_transfer.lease import LeaseState, LeaseTable


def table(**change: float) -> LeaseTable:
    return LeaseTable(**{"lease_s": 10.0, "max_lease_s": 100.0, "max_leases": 4} | change)


def test_a_lease_hands_its_blocks_back_once_when_it_is_closed() -> None:
    leases = table()
    assert leases.add("a", [3, 1], 0.0)
    assert leases.open("a", 1.0)
    assert leases.end("a", 2.0)
    assert not leases.end("a", 2.0)
    assert leases.take_released() == [("a", [3, 1])]
    assert leases.take_released() == []
    assert leases.expire(1000.0) == []


def test_a_lease_that_nobody_opens_or_renews_expires() -> None:
    leases = table()
    leases.add("a", [1], 0.0)
    leases.add("b", [2], 5.0)
    assert leases.next_expiry == 10.0
    assert leases.expire(9.9) == []
    assert leases.expire(10.0) == ["a"]
    assert leases.take_released() == [("a", [1])]
    assert leases.renew("b", 14.0)
    assert leases.expire(23.9) == []
    assert leases.expire(24.0) == ["b"]


def test_a_lease_past_its_time_is_dead_before_anyone_sweeps_it() -> None:
    leases = table()
    leases.add("a", [1], 0.0)
    assert leases.open("a", 0.0)
    assert not leases.renew("a", 10.0)
    assert not leases.begin_read("a", 10.0)
    assert not leases.end("a", 10.0)
    assert leases.take_released() == [("a", [1])]


def test_renewing_has_an_end() -> None:
    leases = table(max_lease_s=15.0)
    leases.add("a", [1], 0.0)
    assert leases.renew("a", 9.0)
    assert leases.next_expiry == 15.0
    assert not leases.renew("a", 15.0)


def test_blocks_under_a_read_are_quarantined_until_the_read_ends() -> None:
    leases = table()
    leases.add("a", [1], 0.0)
    assert not leases.begin_read("a", 0.0), "nobody has opened it"
    leases.open("a", 0.0)
    assert leases.begin_read("a", 1.0)
    assert leases.begin_read("a", 1.0)
    assert leases.expire(10.0) == ["a"]
    assert leases.expire(10.0) == []
    assert leases.state("a") is LeaseState.QUARANTINED
    assert not leases.begin_read("a", 1.0)
    leases.end_read("a")
    assert leases.take_released() == []
    leases.end_read("a")
    assert leases.take_released() == [("a", [1])]
    assert len(leases) == 0


def test_only_one_sink_opens_a_lease() -> None:
    leases = table()
    leases.add("a", [1], 0.0)
    assert leases.open("a", 0.0)
    assert not leases.open("a", 0.0)
    assert not leases.open("b", 0.0)


def test_the_number_of_leases_is_bounded_and_quarantine_counts() -> None:
    leases = table(max_leases=2)
    assert leases.add("a", [1], 0.0)
    assert leases.add("b", [2], 0.0)
    leases.open("a", 0.0)
    leases.begin_read("a", 0.0)
    leases.end("a", 0.0)
    assert not leases.add("c", [3], 0.0)
    leases.end_read("a")
    assert leases.add("c", [3], 0.0)


def test_any_order_of_events_hands_every_block_back_exactly_once_and_never_under_a_read() -> None:
    random = Random(7)
    leases = table(max_leases=8)
    reads: dict[str, int] = {}
    given, back = 0, set()
    now = 0.0
    for _ in range(20_000):
        now += random.random()
        lease_id = str(random.randint(max(0, given - 8), given))
        match random.randint(0, 6):
            case 0:
                given += leases.add(str(given), [given], now)
            case 1:
                leases.open(lease_id, now)
            case 2:
                leases.renew(lease_id, now)
            case 3:
                reads[lease_id] = reads.get(lease_id, 0) + leases.begin_read(lease_id, now)
            case 4 if reads.get(lease_id):
                reads[lease_id] -= 1
                leases.end_read(lease_id)
            case 5:
                leases.end(lease_id, now)
            case 6:
                leases.expire(now)
        for released, blocks in leases.take_released():
            assert blocks == [int(released)]
            assert released not in back
            assert not reads.get(released)
            back.add(released)
        assert len(leases) == given - len(back) <= 8
    assert given > 500
