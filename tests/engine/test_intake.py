"""What a decode worker's load says of offers whose pulls have not begun."""

from concurrent.futures import Future

from decode_workers.intake import Intake
from engine.engine import Engine
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from engine.wire import load_to_pb
from tests.fakes import FakeClock


def test_blocks_that_waiting_pulls_will_take_are_not_free() -> None:
    clock = FakeClock()
    executor = SimulatedExecutor(SimulatedConfig(num_blocks=16, block_size=4), clock.advance)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=64, max_num_seqs=4), secret="", model="m")
    intake = Intake(engine, lambda _entry: Future(), max_pulls=1)

    def offer(request_id: str, first: int, num_tokens: int) -> None:
        tokens = tuple(range(first, first + num_tokens))
        intake.add(Request(RequestId(request_id), tokens, num_tokens, SamplingParams(max_tokens=1), 0), b"", 10.0)

    def num_free() -> int:
        load = load_to_pb(engine.load(), None)
        intake.add_load(load, clock())
        return load.num_free_blocks

    offer("a", 100, 9)
    assert num_free() == 13
    intake.start()
    assert (num_free(), engine.kv.num_free) == (13, 13)  # its blocks are taken, and counted once
    offer("b", 300, 20)
    offer("c", 400, 13)
    assert (num_free(), engine.kv.num_free) == (4, 13)
    offer("d", 500, 40)
    assert num_free() == 0  # more than there are
    intake.cancel(RequestId("d"))
    blocks = intake.end(RequestId("a")).block_ids
    tokens = list(range(100, 109))
    engine.kv.release(
        engine.kv.store(
            tokens, engine.hashes(Request(RequestId("a"), tuple(tokens), 9, SamplingParams(), 0)), blocks, 9
        )
    )
    engine.kv.release(blocks)
    assert (num_free(), engine.kv.num_free) == (7, 16)
    offer("e", 100, 9)  # two of its blocks are cached, and cost nobody anything
    assert num_free() == 6
    executor.close()
