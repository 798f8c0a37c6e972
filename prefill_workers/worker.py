"""The prefill role: compute prompts, offer their KV, send the first token, hold the blocks until they are pulled.

Owns the engine thread of a prefill process. Life of a request: submitted -> waiting -> first chunk scheduled
(offered under a lease) -> chunks computed (announced) -> first token (to the router, and to the sink with the last
announcement) -> lease released. The lease holds references of its own to the blocks, so the sequence can leave
the engine with its first token and the blocks stay until the sink has them or the lease ends.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from engine.clients import Client, Clients
from engine.engine import Engine, Scheduled, TokenOutput
from engine.errors import InvalidRequest
from engine.inbox import Inbox
from engine.kv.layout import BlockId
from engine.request import RequestId
from engine.session import Attached, Cancelled, Ended, SessionCommand, Submitted
from kv_transfer.source import KvSource
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2  # how late a deadline of a waiting request may be noticed


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """Posted by the source when a lease has ended, however it did: its blocks come back."""

    lease_id: str
    block_ids: list[BlockId]


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what is there, take nothing new."""


PrefillCommand = SessionCommand | LeaseReleased | Drain


class PrefillWorker:
    """The loop: receive, schedule, run, publish. `run` returns after `stop`, or when a drain is complete."""

    def __init__(
        self,
        engine: Engine,
        source: KvSource,
        clients: Clients,
        inbox: Inbox[PrefillCommand],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._source = source
        self._clients = clients
        self._inbox = inbox
        self._clock = clock
        self._leases: dict[RequestId, str] = {}  # of requests whose lease has not ended
        self._leased: dict[str, RequestId] = {}
        self._stopping = Event()
        self._draining = False
        self._progress = 0
        self._last_step_s = 0.0
        self._load = pb.Load(num_free_blocks=engine.kv.num_free)

    def current_load(self) -> pb.Load:
        """For heartbeats; any thread."""
        load = pb.Load()
        load.CopyFrom(self._load)
        load.progress = self._progress
        return load

    def stop(self) -> None:
        """Leave the loop after the step in hand. Any thread."""
        self._stopping.set()
        self._inbox.post(Drain())

    def run(self) -> None:
        wait = 0.0
        while not self._stopping.is_set() and not (self._draining and not self._clients):
            for command in self._inbox.take(wait):
                self._receive(command)
            self._expire()
            scheduled = self._engine.schedule()
            if scheduled is not None:
                self._step(scheduled)
            self._publish()
            wait = IDLE_WAIT_S if scheduled is None else 0.0

    def _receive(self, command: PrefillCommand) -> None:
        match command:
            case Attached(session):
                self._clients.attach(session)
            case Submitted(session, message):
                if (client := self._clients.admit(session, message)) is not None:
                    self._submit(client)
            case Cancelled(session, handle):
                if (request_id := self._clients.find(session, handle)) is not None:
                    self._abort(request_id, "cancelled")
            case Ended(session):
                for request_id in self._clients.end(session):
                    self._abort(request_id, "its router is gone")
            case LeaseReleased(lease_id, block_ids):
                self._release(lease_id, block_ids)
            case Drain():
                self._draining = True

    def _submit(self, client: Client) -> None:
        try:
            self._engine.submit(client.request)
        except InvalidRequest as error:
            self._clients.refuse(client.request.id, error)

    def _step(self, scheduled: Scheduled) -> None:
        started = self._clock()
        self._offer(scheduled, started)

        def announce(group: int) -> None:
            self._progress += 1
            block_size = self._engine.kv.block_size
            for chunk in scheduled.batch.chunks:
                lease_id = self._leases.get(chunk.request_id)
                if lease_id is not None:
                    self._source.announce(lease_id, group, (chunk.start + len(chunk.token_ids)) // block_size)

        for token in self._engine.run(scheduled, announce):
            self._finish(token)
        self._progress += 1
        self._last_step_s = self._clock() - started

    def _offer(self, scheduled: Scheduled, now: float) -> None:
        """Lease the blocks of sequences whose first chunk this is. A request that ends here needs no lease."""
        for request_id in scheduled.preempted:  # its blocks are no longer what was offered
            self._abort(request_id, "preempted")
        for sequence in scheduled.started:
            request = sequence.request
            client = self._clients[request.id]
            client.started = now
            timing = self._clients.output(request.id).timing
            timing.queued_us = round((now - client.submitted) * 1e6)
            timing.cached_tokens = sequence.num_computed_tokens
            num_output = len(request.token_ids) - request.num_prompt_tokens
            if num_output + 1 >= request.params.max_tokens:
                continue
            num_tokens = len(request.token_ids)
            block_ids = sequence.block_ids[: self._engine.executor.layout.num_blocks_for(num_tokens)]
            num_final = sequence.num_computed_tokens // self._engine.kv.block_size
            opened = self._source.open(request.id, block_ids, num_tokens, num_final)
            if opened is None:
                self._engine.cancel(request.id)
                self._clients.fail(request.id, "the prefill worker holds too many leases", retryable=True)
                continue
            lease_id, offer = opened
            self._engine.kv.retain(block_ids)
            self._leases[request.id] = lease_id
            self._leased[lease_id] = request.id
            self._clients.output(request.id).offer = offer

    def _finish(self, token: TokenOutput) -> None:
        """A first token: the sequence leaves the engine; its client stays known while the lease lives."""
        request_id = token.request_id
        client = self._clients[request_id]
        assert client.started is not None, request_id
        self._clients.say_token(token)
        self._clients.output(request_id).timing.prefill_us = round((self._clock() - client.started) * 1e6)
        self._engine.kv.release(self._engine.detach(request_id) if token.finish_reason is None else [])
        lease_id = self._leases.get(request_id)
        if lease_id is None:
            self._clients.forget(request_id)
        else:
            self._source.finish(lease_id, token.token_id, token.finish_reason is not None)

    def _abort(self, request_id: RequestId, reason: str) -> None:
        """End a request in any state. Idempotent; the blocks of its lease come back through LeaseReleased."""
        self._engine.cancel(request_id)
        lease_id = self._leases.get(request_id)
        if lease_id is not None:
            self._source.abort(lease_id, reason)
        if request_id in self._clients:
            self._clients.fail(request_id, reason, retryable=True)

    def _release(self, lease_id: str, block_ids: list[BlockId]) -> None:
        self._engine.kv.release(block_ids)
        request_id = self._leased.pop(lease_id)
        del self._leases[request_id]
        if not self._engine.cancel(request_id):
            self._clients.forget(request_id)
        elif request_id in self._clients:  # the lease ended under a prompt still being computed
            self._clients.fail(request_id, "the lease ended before the prompt was computed", retryable=True)

    def _expire(self) -> None:
        for request_id in self._clients.expired():
            self._abort(request_id, "the request's deadline passed")

    def _publish(self) -> None:
        load = self._engine.load()
        self._load = pb.Load(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_waiting_tokens=load.num_waiting_tokens,
            num_handoffs=len(self._leases),
            progress=self._progress,
            last_step_us=round(self._last_step_s * 1e6),
            draining=self._draining,
        )
        self._clients.flush(self._load, self._engine.kv)
