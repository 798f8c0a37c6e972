"""What a session counts beside its worker's reports, from the decision to the frame that says it is in those."""

import random

from protos import worker_pb2 as pb
from router.cluster_view import Reservation
from tests.router.dispatch.test_session import Worker, serving


class Sink:
    def token(self, index: int, token_id: int) -> None: ...
    def output(self, output: pb.Output) -> None: ...
    def lost(self) -> None: ...


def frame(worker: Worker, num_submits: int, **fields) -> None:
    worker._receive(pb.Frame(number=worker._num_frames, load=pb.Load(), num_submits=num_submits, **fields))
    worker._num_frames += 1


async def test_a_request_counts_until_a_frame_counts_its_submit(monkeypatch):
    """In the order in which they were sent, which is not that of the decisions; closed ones keep their place."""
    for seed in range(100):
        rng = random.Random(seed)
        async with serving(monkeypatch) as worker:
            session, state = worker.session, worker.session.state
            assert state is not None
            opened, sent, gone, told = [], [], set(), 0
            for _ in range(60):
                act = rng.random()
                if act < 0.3:
                    opened.append(session.open(Sink(), Reservation(prefill_tokens=1)))
                elif act < 0.5 and set(opened) - set(sent) - gone:
                    handle = rng.choice(sorted(set(opened) - set(sent) - gone))
                    session.submit(handle, pb.Submit(), 1000, b"")
                    sent.append(handle)
                elif act < 0.65 and set(opened) - gone:
                    handle = rng.choice(sorted(set(opened) - gone))
                    session.close(handle, cancel=rng.random() < 0.5)
                    gone.add(handle)
                elif act < 0.7:
                    frame(worker, 0)  # a heartbeat
                else:
                    told = rng.randrange(told, len(sent) + 1)
                    frame(worker, told)
                assert state.row().num_pending == len(set(opened) - set(sent[:told]) - gone)
            assert worker.commands.count("submit") == len(sent)
