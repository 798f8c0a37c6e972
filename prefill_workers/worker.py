"""The prefill role: compute prompts, offer their KV, send the first token, hold the blocks until they are pulled.

Life of a request: submitted -> waiting -> first chunk scheduled (offered under a lease) -> chunks computed
(announced) -> first token (to the router, and to the sink with the last announcement) -> lease released. The lease
holds references of its own to the blocks, so the sequence leaves the engine with its first token and the blocks
stay until the sink has them or the lease ends. The client stays known as long: leaving ends the lease, too.
"""

from dataclasses import dataclass

from engine.clients import Client, Clients
from engine.engine import Engine, Scheduled, TokenOutput
from engine.kv.layout import BlockId
from engine.request import RequestId
from engine.sequence import Sequence
from kv_transfer.source import KvSource
from protos import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """Posted by the source when a lease has ended, however it did: its blocks come back."""

    lease_id: str
    block_ids: list[BlockId]


class PrefillRole:
    """Implements engine.loop.Role[LeaseReleased]."""

    def __init__(self, engine: Engine, clients: Clients, source: KvSource) -> None:
        self._engine = engine
        self._clients = clients
        self._source = source
        self._leases: dict[RequestId, str] = {}  # that have not ended
        self._leased: dict[str, RequestId] = {}  # the same, the other way

    def submit(self, client: Client, message: pb.Submit) -> None:  # noqa: ARG002
        self._engine.submit(client.request, decodes=False)

    def receive(self, command: LeaseReleased) -> None:
        self._engine.kv.release(command.block_ids)
        request_id = self._leased.pop(command.lease_id)
        del self._leases[request_id]
        if self._engine.cancel(request_id):  # the lease ended under a prompt still being computed
            self._clients.fail(request_id, "the lease ended before the prompt was computed", retryable=True)
        self._clients.forget(request_id)

    def abort(self, request_id: RequestId) -> None:
        """The blocks of a lease come back through LeaseReleased."""
        self._engine.cancel(request_id)
        if request_id in self._leases:
            self._source.abort(self._leases[request_id], "the request was given up")

    def before_schedule(self) -> None:
        pass

    def before_run(self, scheduled: Scheduled, now: float) -> None:
        for request_id in scheduled.preempted:  # its blocks are no longer what was offered
            self.abort(request_id)
            self._clients.fail(request_id, "preempted", retryable=True)
        for sequence in scheduled.started:
            if sequence.request.id in self._clients:
                self._start(sequence, now)

    def group_done(self, scheduled: Scheduled, group: int) -> None:
        block_size = self._engine.kv.block_size
        for sequence, chunk in zip(scheduled.sequences, scheduled.batch.chunks, strict=True):
            lease_id = self._leases.get(chunk.request_id) if sequence.running else None
            if lease_id is not None:
                self._source.announce(lease_id, group, chunk.end // block_size)

    def token(self, token: TokenOutput, now: float) -> None:
        """A first token: the sequence leaves the engine."""
        request_id, finished = token.request_id, token.finish_reason is not None
        started = self._clients[request_id].started
        assert started is not None, request_id
        self._clients.output(request_id).timing.prefill_us = round((now - started) * 1e6)
        if not finished:
            self._engine.kv.release(self._engine.detach(request_id))
        lease_id = self._leases.get(request_id)
        if lease_id is None:
            self._clients.forget(request_id)
        else:
            self._source.finish(lease_id, token.token_id, finished)

    def add_load(self, load: pb.Load) -> None:
        load.num_handoffs = len(self._leases)

    def _start(self, sequence: Sequence, now: float) -> None:
        """The first chunk is about to run: say so, and offer the blocks unless the first token will be the last."""
        request = sequence.request
        client = self._clients[request.id]
        client.started = now
        timing = self._clients.output(request.id).timing
        timing.queued_us = round((now - client.submitted) * 1e6)
        timing.cached_tokens = sequence.num_computed_tokens
        num_tokens = len(request.token_ids)
        if num_tokens - request.num_prompt_tokens + 1 < request.params.max_tokens:
            self._offer(sequence, num_tokens)

    def _offer(self, sequence: Sequence, num_tokens: int) -> None:
        request_id = sequence.request.id
        block_ids = sequence.block_ids[: self._engine.executor.layout.num_blocks_for(num_tokens)]
        num_final = sequence.num_computed_tokens // self._engine.kv.block_size
        opened = self._source.open(request_id, block_ids, num_tokens, num_final)
        if opened is None:
            self._engine.cancel(request_id)
            self._clients.fail(request_id, "the prefill worker holds too many leases", retryable=True)
            return
        lease_id, offer = opened
        self._engine.kv.retain(block_ids)
        self._leases[request_id] = lease_id
        self._leased[lease_id] = request_id
        self._clients.output(request_id).offer = offer
