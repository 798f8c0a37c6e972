from engine.clients import Clients
from engine.session import SessionId
from protos import worker_pb2 as pb


def submit(handle: int, request_id: str) -> pb.Submit:
    return pb.Submit(handle=handle, request_id=request_id, token_ids=[1], num_prompt_tokens=1, timeout_ms=1000)


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
