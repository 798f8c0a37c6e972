"""A worker without an engine: speaks protos/worker.proto over a real stream and does what a test says.

Tokens are a function of prompt and position alone, so any stream can be compared with the undisturbed one, and a
submit whose appended tokens are wrong shows up in `violations`. A test scripts it with `hooks`, awaited before each
point of a request's life, and with `kill`, `freeze`, `skip_frame` and `draining`.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from engine.kv.block_hash import bytes_to_tokens
from engine.message_server import MessageServer
from engine.message_stream import MessageStream
from engine.session import SERVICE
from engine.wire import lone_tokens_to_bytes
from protos import worker_pb2 as pb
from router.membership import Joined


def token_at(prompt: Sequence[int], index: int) -> int:
    return (sum(prompt) * 31 + index * 7919) % 1009


def expected_tokens(prompt: Sequence[int], max_tokens: int) -> list[int]:
    return [token_at(prompt, index) for index in range(max_tokens)]


class Signal:
    """Lets a test wait for a condition without polling: whoever changes something notifies."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()

    async def until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self._event.clear()
                await self._event.wait()


class FakeError(Exception):
    """Raised by a hook: the worker fails the request with this error."""

    def __init__(self, message: str, *, retryable: bool, param: str = "") -> None:
        super().__init__(message)
        self.error = pb.Error(message=message, retryable=retryable, param=param)


@dataclass(slots=True)
class Job:
    submit: pb.Submit
    session: "_Session"
    task: asyncio.Task[None] | None = None
    index: int = 0  # of the token about to be sent

    @property
    def token_ids(self) -> tuple[int, ...]:
        return bytes_to_tokens(self.submit.token_ids)

    def send(self, **fields: object) -> None:
        handle, output = self.submit.handle, pb.Output(handle=self.submit.handle, **fields)
        frame = pb.Frame(outputs=[output])
        plain = pb.Output(handle=handle, index=output.index, token_ids=output.token_ids)
        if len(output.token_ids) == 1 and output == plain:  # as workers do
            frame = pb.Frame(tokens=lone_tokens_to_bytes([(handle, output.index, output.token_ids[0])]))
        self.session.frames.put_nowait(frame)


Hook = Callable[[Job], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Session:
    frames: asyncio.Queue[pb.Frame] = field(default_factory=asyncio.Queue)
    jobs: dict[int, Job] = field(default_factory=dict)
    number: int = 0
    num_submits: int = 0


def _clock_us() -> int:
    """Far from the router's clock, as another machine's is."""
    return round((time.monotonic() + 1e6) * 1e6)


class FakeWorker:
    """Points at which `hooks` run: offer, first_token, prefilled (prefill); pull, token (decode)."""

    def __init__(
        self,
        worker_id: str,
        role: str,
        signal: Signal,
        *,
        token: str = "",
        fingerprint: str = "f",
        block_size: int = 4,
        num_blocks: int = 10_000,
        max_model_len: int = 100_000,
        max_num_seqs: int = 256,
        heartbeat_s: float = 0.05,
    ) -> None:
        self.id, self.role, self.epoch = worker_id, role, 1
        self.hooks: dict[str, Hook] = {}
        self.submits: list[pb.Submit] = []
        self.num_cancels = 0
        self.num_sessions = 0
        self.violations: list[str] = []
        self.hashes: list[int] = []
        self.draining = False
        self.progress: int | None = None  # fixed value; None: grows
        self.address = ""
        self._description = pb.Description(
            worker_id=worker_id,
            role=role,
            model="model",
            fingerprint=fingerprint,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_batch_tokens=8192,
            max_num_seqs=max_num_seqs,
        )
        self._signal, self._token, self._heartbeat_s = signal, token, heartbeat_s
        self._sessions: set[_Session] = set()
        self._server: MessageServer | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._num_events = 0
        self._steps = 0

    @property
    def jobs(self) -> list[Job]:
        return [job for session in self._sessions for job in session.jobs.values()]

    async def start(self) -> Joined:
        """Serve, at the address of the last life if there was one."""
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = MessageServer("127.0.0.1", port, token=self._token)
        self._server.register(SERVICE, pb.Command.FromString, self._serve)
        self.address = self._server.address
        await self._server.start()
        return Joined(self.id, self.role, self.address, self.epoch)

    async def kill(self) -> None:
        """Everything it ran and held is gone."""
        server, self._server = self._server, None
        if server is not None:
            for session in self._sessions:
                self._drop_jobs(session)
            await server.stop()
            self.hashes = []

    def freeze(self) -> None:
        self._running.clear()

    def thaw(self) -> None:
        self._running.set()

    def skip_frame(self) -> None:
        """Lose one frame of every session."""
        for session in self._sessions:
            session.number += 1

    def garble(self) -> None:
        """Send every session tokens that are none."""
        for session in self._sessions:
            session.frames.put_nowait(pb.Frame(tokens=b"no multiple of 16"))

    def store(self, hashes: list[int], age_s: float = 0.0) -> None:
        self.hashes += hashes
        for session in self._sessions:
            event, happened = pb.KvEvent(stored=hashes), _clock_us() - round(age_s * 1e6)
            frame = pb.Frame(kv_events=[event], kv_event_number=self._num_events, kv_events_us=happened)
            session.frames.put_nowait(frame)
        self._num_events += 1

    def clear(self, hashes: list[int]) -> None:
        """Forget all blocks, then hold `hashes`: one event."""
        self.hashes = list(hashes)
        for session in self._sessions:
            event = pb.KvEvent(stored=hashes, cleared=True)
            session.frames.put_nowait(pb.Frame(kv_events=[event], kv_event_number=self._num_events))
        self._num_events += 1

    def lose_event(self) -> None:
        self._num_events += 1

    async def _serve(self, stream: MessageStream) -> None:
        session = _Session()
        self.num_sessions += 1
        snapshot = pb.KvSnapshot(next_event_number=self._num_events, hashes=self.hashes)
        session.frames.put_nowait(pb.Frame(description=self._description, kv_snapshot=snapshot))
        reader = asyncio.create_task(self._read(session, stream))
        self._sessions.add(session)
        try:
            while not stream.over:
                try:
                    async with asyncio.timeout(self._heartbeat_s):
                        frame = await session.frames.get()
                except TimeoutError:
                    frame = pb.Frame()
                await self._running.wait()
                frame.number, session.number = session.number, session.number + 1
                frame.load.CopyFrom(self._load())
                frame.num_submits = session.num_submits
                frame.sent_us = _clock_us()
                stream.send(frame)
                self._signal.notify()
        finally:
            reader.cancel()
            self._drop_jobs(session)
            self._sessions.discard(session)
            self._signal.notify()

    def _drop_jobs(self, session: _Session) -> None:
        for job in session.jobs.values():
            job.task.cancel()
        session.jobs.clear()

    def _load(self) -> pb.Load:
        self._steps += 1
        return pb.Load(
            num_running=len(self.jobs),
            num_free_blocks=self._description.num_blocks - sum(len(job.token_ids) // 4 + 1 for job in self.jobs),
            num_waiting_tokens=sum(len(job.token_ids) for job in self.jobs) if self.role == "prefill" else 0,
            progress=self._steps if self.progress is None else self.progress,
            draining=self.draining,
            num_cached_blocks=len(self.hashes),
        )

    async def _read(self, session: _Session, stream: MessageStream) -> None:
        while (command := await stream.read()) is not None:
            await self._running.wait()
            if command.HasField("submit"):
                self.submits.append(command.submit)
                session.num_submits += 1
                job = session.jobs[command.submit.handle] = Job(command.submit, session)
                job.task = asyncio.create_task(self._run(job))
            elif command.HasField("cancel"):
                self.num_cancels += 1
                job = session.jobs.pop(command.cancel.handle, None)
                if job is not None:
                    job.task.cancel()
            self._signal.notify()

    async def _run(self, job: Job) -> None:
        try:
            await (self._prefill(job) if self.role == "prefill" else self._decode(job))
        except FakeError as error:
            job.send(error=error.error)
        finally:
            job.session.jobs.pop(job.submit.handle, None)
            self._signal.notify()

    async def _at(self, point: str, job: Job) -> None:
        await asyncio.sleep(0)
        if (hook := self.hooks.get(point)) is not None:
            await hook(job)
        await self._running.wait()

    async def _prefill(self, job: Job) -> None:
        await self._at("offer", job)
        job.send(offer=f"{self.id}/{job.submit.handle}".encode())
        job.index = self._num_known(job)
        await self._at("first_token", job)
        self._send_token(job, timing=pb.Timing(cached_tokens=0, queued_us=1000, prefill_us=2000))
        await self._at("prefilled", job)

    async def _decode(self, job: Job) -> None:
        job.index = self._num_known(job)
        if job.submit.offer:
            await self._at("pull", job)
            timing = pb.Timing(transfer_blocks=3, transfer_us=500, transport="loopback", queued_us=7, prefill_us=7)
            job.send(handoff_done=True, timing=timing)  # the last two count where it prefilled itself
            job.index += 1
        while job.index < job.submit.params.max_tokens:
            await self._at("token", job)
            if self._send_token(job):
                return
            job.index += 1

    def _num_known(self, job: Job) -> int:
        submit = job.submit
        prompt, appended = job.token_ids[: submit.num_prompt_tokens], job.token_ids[submit.num_prompt_tokens :]
        if list(appended) != expected_tokens(prompt, len(appended)):
            self.violations.append(f"{submit.request_id}: appended {list(appended)}")
        return len(appended)

    def _send_token(self, job: Job, **fields: object) -> bool:
        submit, params = job.submit, job.submit.params
        token = token_at(job.token_ids[: submit.num_prompt_tokens], job.index)
        finish = pb.FINISH_REASON_UNSPECIFIED
        if token in params.stop_token_ids:
            finish = pb.FINISH_REASON_STOP
        elif job.index + 1 >= params.max_tokens:
            finish = pb.FINISH_REASON_LENGTH
        if params.HasField("logprobs"):
            fields["logprobs"] = [pb.TokenLogprobs(token_id=token, logprob=-float(job.index))]
        if params.HasField("prompt_logprobs") and job.index == self._num_known(job):
            fields["prompt_logprobs"] = [pb.TokenLogprobs(token_id=each) for each in job.token_ids[1:]]
        job.send(index=job.index, token_ids=[token], finish_reason=finish, **fields)
        return finish != pb.FINISH_REASON_UNSPECIFIED


@contextlib.asynccontextmanager
async def serving(*workers: FakeWorker):
    """Start workers and stop them at the end, whatever happened to them between."""
    try:
        yield [await worker.start() for worker in workers]
    finally:
        for worker in workers:
            worker.thaw()
            await worker.kill()
