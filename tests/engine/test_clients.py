import pytest

from engine.clients import Clients
from engine.engine import TokenOutput
from engine.kv.block_hash import token_bytes
from engine.kv.cache import KvCache
from engine.request import FinishReason
from engine.session import SessionId
from engine.wire import lone_tokens_from_bytes
from protos import worker_pb2 as pb
from tests.fakes import FakeClock


def submit(handle: int, request_id: str) -> pb.Submit:
    return pb.Submit(
        handle=handle, request_id=request_id, token_ids=token_bytes([1]), num_prompt_tokens=1, timeout_ms=1000
    )


def test_a_handle_that_is_in_use_is_refused_and_free_again_afterwards() -> None:
    clients, session = Clients(pb.Description(), lambda _: None, lambda: 0.0), SessionId(0)
    clients.attach(session)
    first = clients.admit(session, submit(1, "a"))
    assert first is not None
    assert clients.admit(session, submit(1, "b")) is None
    [request_id] = clients.end(session)
    clients.forget(request_id)
    assert len(clients) == 0
    clients.attach(session)
    assert clients.admit(session, submit(1, "b")) is not None


def test_lone_tokens_travel_as_numbers_and_others_with_what_else_is_said_of_their_requests() -> None:
    frames: list[pb.Frame] = []
    clients, session = Clients(pb.Description(), lambda sent: frames.extend(sent.values()), lambda: 0.0), SessionId(0)
    clients.attach(session)
    admitted = [clients.admit(session, submit(handle, "a")) for handle in (1, 2, 3, 4)]
    one, two, three, four = (client.request.id for client in admitted if client is not None)
    clients.output(two).timing.prefill_us = 5  # its token then goes with it
    clients.say_token(TokenOutput(two, 0, 50))
    clients.say_token(TokenOutput(two, 1, 51))
    clients.say_token(TokenOutput(three, 7, 70))
    clients.say_token(TokenOutput(one, 4, 40))
    clients.say_token(TokenOutput(four, 0, 90))
    clients.output(four).timing.prefill_us = 6  # as the roles do with a first token
    clients.say_token(TokenOutput(three, 8, 80, finish_reason=FinishReason.LENGTH))
    clients.flush(pb.Load(), KvCache(4, 4), 0.0, changed=True)
    [frame] = frames
    assert list(lone_tokens_from_bytes(frame.tokens)) == [(3, 7, 70), (1, 4, 40)]
    said = {output.handle: (output.index, list(output.token_ids), output.finish_reason) for output in frame.outputs}
    assert said == {2: (0, [50, 51], 0), 3: (8, [80], pb.FINISH_REASON_LENGTH), 4: (0, [90], 0)}


@pytest.mark.parametrize("num_routers", [1, 2])
def test_other_routers_hear_once_what_is_going_to_be_computed(num_routers: int) -> None:
    frames: list[pb.Frame] = []
    clients = Clients(pb.Description(), lambda sent: frames.extend(sent.values()), lambda: 0.0)
    for number in range(num_routers):
        clients.attach(SessionId(number))
    kv = KvCache(4, 4)
    clients.flush(pb.Load(), kv, 0.0, changed=True)  # says who the worker is
    frames.clear()
    kv.expect([7, 8])
    kv.expect([9])
    clients.flush(pb.Load(), kv, 0.0, changed=False, step_ends=0.0)
    clients.flush(pb.Load(), kv, 0.0, changed=False, step_ends=0.0)
    assert [list(frame.coming) for frame in frames] == ([] if num_routers == 1 else [[7, 8, 9], [7, 8, 9]])


def test_a_router_to_which_nothing_is_said_hears_of_all_steps_now_and_then_and_of_long_ones_when_they_begin() -> None:
    frames: list[tuple[SessionId, pb.Frame]] = []
    clock, kv = FakeClock(100.0), KvCache(2, 1)  # the third block takes the place of the first
    clients = Clients(pb.Description(), lambda sent: frames.extend(sent.items()), clock)
    busy, quiet = SessionId(0), SessionId(1)
    clients.attach(busy)
    clients.attach(quiet)

    def flush(changed: bool = True, step_ends: float | None = None) -> dict[SessionId, pb.Frame]:
        frames.clear()
        clients.flush(pb.Load(), kv, clock(), changed=changed, step_ends=step_ends)
        assert len(frames) == len(dict(frames))
        return dict(frames)

    def step(seconds: float, token: int) -> list[dict[SessionId, pb.Frame]]:
        """What is said where it begins, and when its token is there."""
        begun = flush(token == 1, clock() + seconds)
        clock.advance(seconds)
        blocks = kv.allocate(1)
        assert blocks is not None
        kv.release(kv.store([token], [token], blocks, 1))
        kv.release(blocks)
        clients.say_token(TokenOutput(client.request.id, token, token))
        return [begun, flush()]

    assert set(flush()) == {busy, quiet}  # who the worker is
    client = clients.admit(busy, submit(1, "a"))
    assert client is not None
    [begun, ended] = step(0.04, 1)
    assert (set(begun), set(ended)) == ({busy, quiet}, {busy})
    assert [frame.num_submits for frame in begun.values()] == [1, 0]
    assert list(ended[busy].kv_events) == [pb.KvEvent(stored=[1])]
    [begun, _] = step(0.04, 2)
    assert not begun
    [begun, _] = step(0.04, 3)  # at its end the last report would be 0.12 s old
    assert list(begun) == [quiet]
    assert list(begun[quiet].kv_events) == [pb.KvEvent(stored=[1, 2])]
    assert begun[quiet].kv_events_us == 100.04e6
    first_number = begun[quiet].kv_event_number
    [begun, _] = step(0.04, 4)
    assert not begun
    [begun, _] = step(5.0, 5)
    assert list(begun[quiet].kv_events) == [pb.KvEvent(stored=[3, 4], removed=[1, 2])]
    assert begun[quiet].kv_event_number == first_number + 1
    assert [list(frame.kv_events) for frame in flush(False, clock()).values()] == [
        [pb.KvEvent(stored=[5], removed=[3])]
    ]  # the worker is idle
    assert not flush(changed=False, step_ends=clock() + 5.0)
