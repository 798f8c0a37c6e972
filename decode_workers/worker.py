"""The decode role: pull offered KV, continue sequences from their second token, stream every step to the routers.

Owns the engine thread of a decode process. A request with an offer goes through the intake; one without is
prefilled here (short prompts, long cached prefixes, recovery). A pull that fails ends the attempt with a retryable
error: the router decides what comes next, nobody else retries.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event

from decode_workers.intake import Intake, PullEnded
from engine.clients import Client, Clients
from engine.engine import Engine, Scheduled, TokenOutput
from engine.errors import InvalidRequest
from engine.inbox import Inbox
from engine.request import RequestId
from engine.session import Attached, Cancelled, Ended, SessionCommand, Submitted
from kv_transfer.sink import Pulled
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2  # how late a deadline of a waiting request may be noticed


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what is there, take nothing new."""


DecodeCommand = SessionCommand | PullEnded | Drain


class DecodeWorker:
    """The loop: receive, schedule, run, publish. `run` returns after `stop`, or when a drain is complete."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        clients: Clients,
        inbox: Inbox[DecodeCommand],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._intake = intake
        self._clients = clients
        self._inbox = inbox
        self._clock = clock
        self._decoding_since: dict[RequestId, float] = {}
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
            self._intake.start()
            scheduled = self._engine.schedule()
            if scheduled is not None:
                self._step(scheduled)
            self._publish()
            wait = IDLE_WAIT_S if scheduled is None else 0.0

    def _receive(self, command: DecodeCommand) -> None:
        match command:
            case Attached(session):
                self._clients.attach(session)
            case Submitted(session, message):
                if (client := self._clients.admit(session, message)) is not None:
                    self._submit(client, message.offer)
            case Cancelled(session, handle):
                if (request_id := self._clients.find(session, handle)) is not None:
                    self._abort(request_id, "cancelled")
            case Ended(session):
                for request_id in self._clients.end(session):
                    self._abort(request_id, "its router is gone")
            case PullEnded():
                self._take_in(command)
            case Drain():
                self._draining = True

    def _submit(self, client: Client, offer: bytes) -> None:
        try:
            if offer:
                self._intake.add(client.request, offer, client.deadline)
            else:
                self._engine.submit(client.request)
        except InvalidRequest as error:
            self._clients.refuse(client.request.id, error)

    def _take_in(self, ended: PullEnded) -> None:
        """Give the pulled blocks to the engine, or back to the pool."""
        entry = self._intake.end(ended.request_id)
        pulled = ended.pulled
        if pulled is None or entry.cancelled or ended.request_id not in self._clients:
            self._engine.kv.release(entry.block_ids)
            if ended.error is not None:  # the router's next choice may be a local prefill, so it is worth a try
                log.warning("handoff of %s failed: %s", ended.request_id, ended.error)
                self._clients.fail(ended.request_id, "the KV handoff failed", retryable=True)
            return
        output = self._clients.output(ended.request_id)
        output.handoff_done = True
        _say_pulled(output.timing, pulled)
        if pulled.finished:  # the first token was the last: the prefill worker has said so to the router
            self._engine.kv.release(entry.block_ids)
            self._clients.forget(ended.request_id)
            return
        request = replace(entry.request, token_ids=(*entry.request.token_ids, pulled.first_token))
        self._decoding_since[request.id] = self._clock()
        self._engine.resume(request, entry.block_ids)

    def _step(self, scheduled: Scheduled) -> None:
        started = self._clock()
        for sequence in scheduled.started:
            client = self._clients[sequence.request.id]
            if client.started is None and sequence.request.id not in self._decoding_since:
                client.started = started
                timing = self._clients.output(client.request.id).timing
                timing.queued_us = round((started - client.submitted) * 1e6)
                timing.cached_tokens = sequence.num_computed_tokens

        def progress(_group: int) -> None:
            self._progress += 1

        for token in self._engine.run(scheduled, progress):
            self._say(token)
        self._progress += 1
        self._last_step_s = self._clock() - started

    def _say(self, token: TokenOutput) -> None:
        request_id = token.request_id
        self._clients.say_token(token)
        now = self._clock()
        since = self._decoding_since.get(request_id)
        if since is None:  # the first token of a local prefill
            client = self._clients[request_id]
            assert client.started is not None, request_id
            self._clients.output(request_id).timing.prefill_us = round((now - client.started) * 1e6)
            since = self._decoding_since[request_id] = now
        if token.finish_reason is not None:
            self._clients.output(request_id).timing.decode_us = round((now - since) * 1e6)
            del self._decoding_since[request_id]
            self._clients.forget(request_id)

    def _abort(self, request_id: RequestId, reason: str) -> None:
        """End a request in any state: waiting for blocks, pulling, waiting, running."""
        if not self._intake.cancel(request_id):
            self._engine.cancel(request_id)
        self._decoding_since.pop(request_id, None)
        self._clients.fail(request_id, reason, retryable=True)

    def _expire(self) -> None:
        for request_id in self._clients.expired():
            self._abort(request_id, "the request's deadline passed")

    def _publish(self) -> None:
        load = self._engine.load()
        self._load = pb.Load(
            num_running=load.num_running,
            num_waiting=load.num_waiting + len(self._intake) - self._intake.num_pulling,
            num_free_blocks=load.num_free_blocks,
            num_waiting_tokens=load.num_waiting_tokens,
            num_handoffs=self._intake.num_pulling,
            progress=self._progress,
            last_step_us=round(self._last_step_s * 1e6),
            draining=self._draining,
        )
        self._clients.flush(self._load, self._engine.kv)


def _say_pulled(timing: pb.Timing, pulled: Pulled) -> None:
    timing.transfer_blocks = pulled.num_blocks
    timing.transfer_bytes = pulled.num_bytes
    timing.transfer_us = round(pulled.copy_seconds * 1e6)
    timing.exposed_us = round(pulled.exposed_seconds * 1e6)
    timing.transport = pulled.transport
