"""The decode role: pull offered KV, continue sequences from their second token, prefill by itself when told to.

A request with an offer goes through the intake; one without is prefilled here (short prompts, long cached prefixes,
recovery). A pull that fails ends the attempt with a retryable error: the router decides what comes next, nobody
else retries.
"""

import logging
from collections.abc import Callable

import msgspec

from decode_workers.intake import Intake, PullEnded
from engine.clients import Client, Clients
from engine.engine import Engine, Scheduled, TokenOutput
from engine.request import RequestId
from kv_transfer.sink import Pulled
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)


class DecodeRole:
    """Implements engine.loop.Role[PullEnded]."""

    def __init__(self, engine: Engine, clients: Clients, intake: Intake, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clients = clients
        self._intake = intake
        self._clock = clock
        self._decoding_since: dict[RequestId, float] = {}

    def submit(self, client: Client, message: pb.Submit) -> None:
        if message.offer:
            self._intake.add(client.request, message.offer, client.deadline)
        else:
            self._engine.submit(client.request)

    def receive(self, command: PullEnded) -> None:
        """Give the pulled blocks to the engine, or back to the pool."""
        entry, pulled = self._intake.end(command.request_id), command.pulled
        request_id = entry.request.id
        if pulled is None or entry.cancelled:
            self._engine.kv.release(entry.block_ids)
            if command.error is not None:  # the router's next choice may be a local prefill, so it is worth a try
                log.info("the handoff of %s failed: %s", request_id, command.error)
                self._clients.fail(request_id, "the KV handoff failed", retryable=True)
            return
        output = self._clients.output(request_id)
        output.handoff_done = True
        _say_pulled(output.timing, pulled)
        self._intake.moved(pulled.num_blocks * self._engine.kv.block_size, pulled.link_seconds, self._clock())
        if pulled.finished:  # the first token was the last: the prefill worker has said so to the router
            self._engine.kv.release(entry.block_ids)
            self._clients.forget(request_id)
            return
        self._decoding_since[request_id] = self._clock()
        request = msgspec.structs.replace(entry.request, token_ids=(*entry.request.token_ids, pulled.first_token))
        self._engine.resume(request, entry.block_ids)

    def abort(self, request_id: RequestId) -> None:
        """Waiting for blocks, pulling, waiting or running. Blocks of a pull return when it has ended."""
        if not self._intake.cancel(request_id):
            self._engine.cancel(request_id)
        self._decoding_since.pop(request_id, None)

    def before_schedule(self) -> None:
        self._intake.start()

    def before_run(self, scheduled: Scheduled, now: float) -> None:
        """Sequences that start here and were not pulled are local prefills."""
        for sequence in scheduled.started:
            client = self._clients[sequence.request.id]
            if client.started is None and sequence.request.id not in self._decoding_since:
                client.started = now
                timing = self._clients.output(client.request.id).timing
                timing.queued_us = round((now - client.submitted) * 1e6)
                timing.cached_tokens = sequence.num_computed_tokens

    def group_done(self, scheduled: Scheduled, group: int) -> None:
        pass

    def token(self, token: TokenOutput, now: float) -> None:
        request_id = token.request_id
        since = self._decoding_since.get(request_id)
        if since is None:  # the first token of a local prefill
            started = self._clients[request_id].started
            assert started is not None, request_id
            self._clients.output(request_id).timing.prefill_us = round((now - started) * 1e6)
            since = self._decoding_since[request_id] = now
        if token.finish_reason is not None:
            self._clients.output(request_id).timing.decode_us = round((now - since) * 1e6)
            del self._decoding_since[request_id]
            self._clients.forget(request_id)

    def add_load(self, load: pb.Load) -> None:
        self._intake.add_load(load, self._clock())


def _say_pulled(timing: pb.Timing, pulled: Pulled) -> None:
    timing.transfer_blocks = pulled.num_blocks
    timing.transfer_bytes = pulled.num_bytes
    timing.transfer_us = round(pulled.copy_seconds * 1e6)
    timing.exposed_us = round(pulled.exposed_seconds * 1e6)
    timing.transport = pulled.transport
