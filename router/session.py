"""The router's end of the control plane: one stream to one worker, attached anew whenever it breaks.

The dispatcher makes one WorkerSession per member and runs it as a task. Outputs go straight to the sink their
handle was opened with, load goes to `state`, KV events to the listener. A session is lost when the stream breaks,
a frame is missing, nothing arrives for `silence_s`, or the worker runs requests and its progress stands still for
`stall_s`; every open handle then hears of it once, and is never used again.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import WorkerLost
from engine.message_stream import MessageStream, StreamLost, connect
from engine.session import SERVICE
from protos import worker_pb2 as pb
from router.cluster_view import DECODE, PREFILL, Reservation, WorkerState
from router.index_lag import IndexLag
from router.lanes import Lanes
from router.membership import Joined

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    silence_s: float = 2.0  # workers send a frame at least every 0.5 s
    stall_s: float = 60.0  # above the longest group of layers: a large model on a CPU takes many seconds
    connect_timeout_s: float = 5.0
    attach_timeout_s: float = 60.0  # the first frame waits for the end of the worker's current step
    alive_s: float = 2.0  # workers end sessions that say nothing for some times as long
    min_backoff_s: float = 0.1
    max_backoff_s: float = 2.0


TakeToken = Callable[[int, int], object]


class Sink(Protocol):
    """Where what a worker says about one handle goes. Called on the loop; must not block."""

    def token(self, index: int, token_id: int) -> None:
        """An output of this one token, and of nothing else; unless those go elsewhere: see `tokens_to`."""
        ...

    def output(self, output: pb.Output) -> None: ...

    def lost(self) -> None: ...


class SessionListener(Protocol):
    def session_attached(self, session: "WorkerSession", frame: pb.Frame) -> WorkerState:
        """`frame` has the worker's description and snapshot."""
        ...

    def session_events(self, session: "WorkerSession", frame: pb.Frame) -> None:
        """A frame with KV events, in order and without gaps."""
        ...

    def session_expects(self, session: "WorkerSession", hashes: Sequence[int]) -> None:
        """The worker is going to compute these blocks; see Frame.coming."""
        ...

    def session_reported(self, session: "WorkerSession") -> None:
        """After every frame: the load is new, outputs have been delivered."""
        ...

    def session_lost(self, session: "WorkerSession", reason: str) -> None:
        """Before the open handles hear of it."""
        ...


class WorkerSession:
    """`state` is None while not attached. All methods are called on the loop."""

    def __init__(
        self,
        member: Joined,
        listener: SessionListener,
        config: SessionConfig,
        *,
        model: str,
        token: str,
        router_id: str,
        lanes: Lanes,
        clock: Callable[[], float],
    ) -> None:
        self.member = member
        self.lanes = lanes
        self.state: WorkerState | None = None
        self.last_frame_at = clock()
        self.index_lag = IndexLag()
        self._listener = listener
        self._config = config
        self._model = model
        self._token = token
        self._router_id = router_id
        self._clock = clock
        self._sinks: dict[int, Sink] = {}
        self._take_token: dict[int, TakeToken] = {}  # of the same handles
        self._sent: set[int] = set()
        self._retired = False
        self._stream: MessageStream | None = None
        self._next_frame = 0
        self._next_event = 0
        self._progress = 0
        self._progressed_at = 0.0
        self._stalled = False
        self._spoke_at = 0.0

    @property
    def usable(self) -> bool:
        """Whether new requests may go here."""
        return self.state is not None and self.state.usable

    @property
    def retired(self) -> bool:
        return self._retired

    @property
    def num_open(self) -> int:
        return len(self._sinks)

    def open(self, sink: Sink, part: Reservation) -> int:
        """Reserve room for a request that will be submitted; returns its handle. See WorkerState.reserve."""
        assert self.state is not None
        handle = self.lanes.new_handle()
        self._sinks[handle] = sink
        self._take_token[handle] = sink.token
        self.state.reserve(handle, part)
        return handle

    def tokens_to(self, handle: int, take: TakeToken) -> None:
        """From now on the sink of an open handle leaves lone tokens to `take`, with their indices."""
        if handle in self._take_token:
            self._take_token[handle] = take

    def submit(self, handle: int, template: pb.Submit, timeout_ms: int, offer: bytes) -> None:
        """Send a request whose handle is open: `template` with these fields set."""
        assert self.state is not None
        assert handle in self._sinks, handle
        command = pb.Command()
        message = command.submit
        message.CopyFrom(template)
        message.handle, message.timeout_ms, message.offer = handle, timeout_ms, offer
        self._sent.add(handle)
        self.state.sent(handle)
        self._send(command)

    def close(self, handle: int, *, cancel: bool) -> None:
        """Hear no more of `handle`; with `cancel` the worker drops it too. Idempotent."""
        self._take_token.pop(handle, None)
        if self._sinks.pop(handle, None) is None:
            return
        self.lanes.release(handle)
        if self.state is None:
            return
        self.state.counted(handle)
        if handle in self._sent:
            self._sent.remove(handle)
            if cancel:
                self._send(pb.Command(cancel=pb.Cancel(handle=handle)))
        self._end_if_idle()

    def retire(self) -> None:
        """Take no new requests, end with the last one; do not attach again."""
        self._retired = True
        self._update_state()
        self._end_if_idle()

    def revive(self) -> None:
        """The member is back before its last request ended."""
        self._retired = False
        self._update_state()

    async def run(self) -> None:
        """Attach, serve until lost, and again; returns when retired and idle."""
        backoff, failure = self._config.min_backoff_s, ""
        try:
            while not self._retired:
                reason = await self._serve_once()
                if self._lose(reason):
                    backoff, failure = self._config.min_backoff_s, ""
                elif reason != failure and not self._retired:
                    log.warning("worker %s cannot be attached: %s", self.member.worker_id, reason)
                    failure = reason
                if not self._retired:
                    await asyncio.sleep(backoff)
                    backoff = min(2 * backoff, self._config.max_backoff_s)
        finally:
            self._lose("the session was closed")

    async def _serve_once(self) -> str:
        """One stream from attach to loss; returns why it ended."""
        try:
            await self._serve()
            return "the worker ended the session"
        except TimeoutError:
            return "no first frame in time"
        except (StreamLost, WorkerLost) as error:
            return str(error)
        except Exception as error:  # the guard at this boundary: whatever a frame provoked costs one session
            log.exception("session to worker %s failed", self.member.worker_id)
            return f"internal error: {type(error).__name__}"

    async def _serve(self) -> None:
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                stream = await connect(self.member.address, SERVICE, self._token, pb.Frame.FromString)
        except TimeoutError:
            raise StreamLost("it does not answer") from None
        self._stream = stream
        try:
            self._end_if_idle()  # it may have been retired meanwhile
            stream.send(pb.Command(attach=pb.Attach(router_id=self._router_id)))
            async with asyncio.timeout(self._config.attach_timeout_s):
                first = await stream.read()
            if first is None:
                return
            self._begin(first)
            stream.deliver_to(self._receive)
            watchdog = asyncio.create_task(self._watch())
            try:
                await stream.wait_over()
            finally:
                watchdog.cancel()
        finally:
            self._stream = None
            stream.abort()

    def _begin(self, frame: pb.Frame) -> None:
        """Frame 0: who the worker is and what it holds."""
        described, member = frame.description, self.member
        if frame.number != 0 or not frame.HasField("description") or not frame.HasField("kv_snapshot"):
            raise WorkerLost("its first frame lacks description or snapshot")
        if (described.worker_id, described.role) != (member.worker_id, member.role) or member.role not in (
            PREFILL,
            DECODE,
        ):
            raise WorkerLost(f"it is {described.role} worker {described.worker_id}, not {member.role}")
        if not (described.block_size and described.max_model_len and described.max_batch_tokens):
            raise WorkerLost("its description lacks a size; router and worker must be of one version")
        if described.model != self._model:
            raise WorkerLost(f"it serves model {described.model!r}, not {self._model!r}")
        self._next_event = frame.kv_snapshot.next_event_number
        self._next_frame = 0
        self.index_lag = IndexLag()
        self._progressed_at = self._clock()
        self.state = self._listener.session_attached(self, frame)
        self._update_state()
        self._receive(frame)

    def _receive(self, frame: pb.Frame) -> None:
        if frame.number != self._next_frame:
            raise WorkerLost(f"frame {self._next_frame} is missing, {frame.number} came")
        self._next_frame += 1
        state = self.state
        assert state is not None
        self.last_frame_at = self._clock()
        self.index_lag.frame_came(frame.sent_us / 1e6, self.last_frame_at)
        load = frame.load
        state.report(load, frame.num_submits)
        self._check_progress(load.progress, load.num_running > 0)
        if frame.kv_events:
            if frame.kv_event_number != self._next_event:
                raise WorkerLost(f"KV event {self._next_event} is missing, {frame.kv_event_number} came")
            self._next_event += len(frame.kv_events)
            self._listener.session_events(self, frame)
        if frame.coming:
            self._listener.session_expects(self, frame.coming)
        self._hand_out(state, frame)
        if self.last_frame_at - self._spoke_at > self._config.alive_s:  # workers send frames more often than that
            self._send(pb.Command())
        self._listener.session_reported(self)

    def _hand_out(self, state: WorkerState, frame: pb.Frame) -> None:
        sinks, take_token, pending = self._sinks, self._take_token, state.has_pending
        try:
            tokens = self.lanes.route(frame.tokens, self.last_frame_at)
        except ValueError as error:
            raise WorkerLost(f"it sent tokens that are none: {error}") from None
        for handle, index, token_id in tokens:
            if pending:
                state.counted(handle)
            take = take_token.get(handle)
            if take is not None:
                take(index, token_id)
        for output in frame.outputs:
            handle = output.handle
            sink = sinks.get(handle)
            if sink is not None:
                state.counted(handle)
                sink.output(output)

    def _check_progress(self, progress: int, running: bool) -> None:
        """Progress, not liveness, is health. A stalled worker stays unusable, even attached anew, until it moves."""
        now = self.last_frame_at
        if progress != self._progress or not running:
            self._progress, self._progressed_at = progress, now
            if self._stalled:
                self._stalled = False
                self._update_state()
        elif not self._stalled and now - self._progressed_at > self._config.stall_s:
            self._stalled = True
            raise WorkerLost(f"it runs requests and made no progress for {self._config.stall_s} s")

    def _update_state(self) -> None:
        if self.state is not None:
            self.state.closed = self._retired or self._stalled

    async def _watch(self) -> None:
        """Two looks before the verdict: after a pause of this process the frames of that time are still unread."""
        silence_s, overdue = self._config.silence_s, False
        while True:
            left = self.last_frame_at + silence_s - self._clock()
            if left <= 0 and overdue:
                return self._end(f"silent for {silence_s} s")
            overdue = left <= 0
            await asyncio.sleep(silence_s / 8 if overdue else left)

    def _send(self, command: pb.Command) -> None:
        """In order. A worker that does not read falls silent, and is lost by that."""
        if self._stream is not None:
            self._spoke_at = self.last_frame_at
            self._stream.send(command)

    def _end_if_idle(self) -> None:
        if self._retired and not self._sinks:
            self._end("the worker left")

    def _end(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.abort(WorkerLost(reason))

    def _lose(self, reason: str) -> bool:
        """Whether there was an attached session to lose."""
        if self.state is None:
            return False
        self.state = None
        sinks, self._sinks = self._sinks, {}
        self._take_token.clear()
        self._sent.clear()
        self._listener.session_lost(self, reason)
        for handle, sink in sinks.items():
            self.lanes.release(handle)
            sink.lost()
        return True
