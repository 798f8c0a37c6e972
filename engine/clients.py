"""Which router asked for which request, and the frame being composed for each router.

Owned by a worker's engine thread, one per worker, the same in both roles. A request is known from `admit` until
`forget`; everything said about it between two `flush` calls travels in one frame of its session. A router to which
nothing is said hears of the worker's load and blocks now and then: see engine.backlog.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.backlog import Backlog
from engine.engine import TokenOutput
from engine.errors import InvalidRequest
from engine.kv.cache import KvCache
from engine.request import Request, RequestId
from engine.session import SessionId
from engine.wire import LoneToken, finish_to_pb, logprobs_to_pb, lone_tokens_to_bytes, request_from_pb
from protos import worker_pb2 as pb


@dataclass(slots=True)
class Client:
    """Who waits for one request, since when, and until when. Times are the worker's monotonic seconds."""

    request: Request
    session: SessionId
    handle: int
    submitted: float
    deadline: float
    started: float | None = None  # first chunk scheduled


@dataclass(slots=True)
class _Draft:
    fresh: bool = True  # nothing sent yet: the next frame describes the worker
    next_event: int = 0  # number of the next KV event it hears of
    num_submits: int = 0  # that were taken
    backlog: Backlog = field(default_factory=Backlog)
    outputs: dict[int, pb.Output] = field(default_factory=dict)  # by handle
    tokens: list[LoneToken] = field(default_factory=list)  # said before `outputs`


class Clients:
    """`deliver` takes the frames of a step."""

    def __init__(
        self,
        description: pb.Description,
        deliver: Callable[[Mapping[SessionId, pb.Frame]], None],
        clock: Callable[[], float],
    ) -> None:
        self._description = description
        self._deliver = deliver
        self._clock = clock
        self._drafts: dict[SessionId, _Draft] = {}
        self._clients: dict[RequestId, Client] = {}
        self._by_handle: dict[tuple[SessionId, int], RequestId] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._clients

    def __getitem__(self, request_id: RequestId) -> Client:
        return self._clients[request_id]

    def attach(self, session: SessionId) -> None:
        self._drafts[session] = _Draft()

    def end(self, session: SessionId) -> list[RequestId]:
        """The router is gone. Returns its requests, for the role to abort."""
        self._drafts.pop(session, None)
        return [request_id for request_id, client in self._clients.items() if client.session == session]

    def admit(self, session: SessionId, message: pb.Submit) -> Client | None:
        """Know a new request. None when its session has ended or its handle is taken (a router bug, refused)."""
        if session not in self._drafts:
            return None
        self._drafts[session].num_submits += 1
        if (session, message.handle) in self._by_handle:
            return None
        request_id = RequestId(f"{message.request_id}/{session}.{message.handle}")
        now = self._clock()
        request = request_from_pb(message, request_id)
        client = Client(request, session, message.handle, submitted=now, deadline=now + message.timeout_ms / 1000)
        self._clients[request_id] = client
        self._by_handle[session, message.handle] = request_id
        return client

    def find(self, session: SessionId, handle: int) -> RequestId | None:
        return self._by_handle.get((session, handle))

    def forget(self, request_id: RequestId) -> None:
        client = self._clients.pop(request_id, None)
        if client is not None:
            del self._by_handle[client.session, client.handle]

    def expired(self) -> list[RequestId]:
        now = self._clock()
        return [request_id for request_id, client in self._clients.items() if client.deadline <= now]

    def output(self, request_id: RequestId) -> pb.Output:
        """The draft of what this step says about a request. Writes to an unknown request go nowhere."""
        draft, handle = self._draft(request_id)
        output = draft.outputs.get(handle)
        if output is None:
            output = draft.outputs[handle] = pb.Output(handle=handle)
            if draft.tokens and draft.tokens[-1][0] == handle:  # said just before, it is not alone any more
                _, output.index, token_id = draft.tokens.pop()
                output.token_ids.append(token_id)
        return output

    def say_token(self, token: TokenOutput) -> None:
        if token.finish_reason is None and token.logprobs is None and not token.prompt_logprobs:
            draft, handle = self._draft(token.request_id)
            if handle not in draft.outputs:  # else it would overtake the tokens there
                draft.tokens.append((handle, token.index, token.token_id))
                return
        output = self.output(token.request_id)
        if not output.token_ids:
            output.index = token.index
        output.token_ids.append(token.token_id)
        if token.logprobs is not None:
            output.logprobs.append(logprobs_to_pb(token.logprobs))
        if token.prompt_logprobs:
            output.prompt_logprobs.extend(map(logprobs_to_pb, token.prompt_logprobs))
        output.finish_reason = finish_to_pb(token.finish_reason)

    def _draft(self, request_id: RequestId) -> tuple[_Draft, int]:
        """Where the next words about a request go, and its handle there; of an unknown one: nowhere."""
        client = self._clients.get(request_id)
        draft = self._drafts.get(client.session) if client else None
        return (_Draft(), 0) if client is None or draft is None else (draft, client.handle)

    def fail(self, request_id: RequestId, message: str, *, retryable: bool) -> None:
        """Say the attempt is over, and forget it."""
        self._end(request_id, pb.Error(message=message, retryable=retryable))

    def refuse(self, request_id: RequestId, error: InvalidRequest) -> None:
        self._end(request_id, pb.Error(message=error.message, param=error.param or "", code=error.code))

    def _end(self, request_id: RequestId, error: pb.Error) -> None:
        self.output(request_id).error.CopyFrom(error)
        self.forget(request_id)

    def flush(
        self, load: pb.Load, kv: KvCache, events_since: float, *, changed: bool, step_ends: float | None = None
    ) -> None:
        """Send each session whose time it is one frame with what it has not heard yet.

        `events_since`: when the first of the cache's undrained events happened. `changed`: the worker has taken
        something, or run. `step_ends`: of the step that begins, or of what holds up the next one, or now where there is
        nothing to do; None: only those hear to whom something is said, and the others soon, where a step begins.
        """
        now = self._clock()
        events, coming = kv.drain_events(), kv.drain_coming()
        if len(self._drafts) == 1:  # the one router knows what it has sent
            coming.clear()
        frames: dict[SessionId, pb.Frame] = {}
        for session, draft in self._drafts.items():
            if changed or events or coming:
                draft.backlog.add(events, events_since, coming)
            is_due = step_ends is not None and draft.backlog.is_due(step_ends)
            if draft.fresh or draft.outputs or draft.tokens or is_due:
                frames[session] = self._frame(draft, load, kv, now, reports=step_ends is not None)
        if frames:
            self._deliver(frames)

    def _frame(self, draft: _Draft, load: pb.Load, kv: KvCache, now: float, *, reports: bool) -> pb.Frame:
        coming = draft.backlog.coming
        frame = pb.Frame(load=load, outputs=draft.outputs.values(), coming=coming, num_submits=draft.num_submits)
        if draft.tokens:
            frame.tokens = lone_tokens_to_bytes(draft.tokens)
        event = draft.backlog.told(now, reports=reports)
        if draft.fresh:  # the snapshot holds the events drained until now, and makes the router exact
            draft.next_event = kv.next_event_number
            frame.description.CopyFrom(self._description)
            frame.kv_snapshot.next_event_number = draft.next_event
            frame.kv_snapshot.hashes.extend(kv.snapshot())
        elif event is not None:
            frame.kv_event_number = draft.next_event
            frame.kv_events_us = round(draft.backlog.since * 1e6)
            frame.kv_events.append(pb.KvEvent(stored=event.stored, removed=event.removed, cleared=event.cleared))
            draft.next_event += 1
        draft.fresh = False
        draft.outputs, draft.tokens = {}, []
        return frame
