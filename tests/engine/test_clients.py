import pytest

from engine.clients import Clients
from engine.engine import TokenOutput
from engine.kv.block_hash import token_bytes
from engine.kv.cache import KvCache
from engine.request import FinishReason
from engine.session import SessionId
from engine.wire import lone_tokens_from_bytes
from protos import worker_pb2 as pb


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
    clients.flush(pb.Load(), KvCache(4, 4), 0.0)
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
    clients.flush(pb.Load(), kv, 0.0)  # says who the worker is
    frames.clear()
    kv.expect([7, 8])
    kv.expect([9])
    clients.flush(pb.Load(), kv, 0.0)
    clients.flush(pb.Load(), kv, 0.0)
    assert [list(frame.coming) for frame in frames] == ([] if num_routers == 1 else [[7, 8, 9], [7, 8, 9]])
