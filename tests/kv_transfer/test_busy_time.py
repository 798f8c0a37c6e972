from kv_transfer.busy_time import BusyTime


def test_time_in_which_several_run_counts_once() -> None:
    busy = BusyTime()
    assert busy.take(1.0) == 0.0
    busy.begin(1.0)
    busy.begin(2.0)
    busy.end(3.0)
    assert busy.take(4.0) == 3.0
    busy.end(6.0)
    busy.begin(10.0)
    busy.end(11.0)
    assert busy.take(20.0) == 3.0
    assert busy.take(30.0) == 0.0
