"""`LLM`: generate text from Python, with the engine in this process or against a server, with the same results.

It owns a backend (`baton.llm_local` or `baton.llm_remote`, loaded only when used) and turns its events into lists
and iterators. Whatever ends an iteration early (an error, Ctrl-C, a `break`) cancels what is still under way.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from operator import index
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, Self, cast

from rich.console import Console

from baton.outputs import Backend, Conversation, Ended, Increment, Job, Message, RequestOutput
from baton.progress import throughput_bar
from cluster.devices import GPU_MEMORY_FRACTION, Device
from cluster.spec import KvDtype, Load
from engine.errors import InvalidRequest
from engine.request import SamplingParams

Prompt = str | Sequence[int]
Increments = Generator[Increment, None, None]
Params = SamplingParams | Sequence[SamplingParams]

REMOTE_NUM_SEQS = 64  # requests sent to a server at once

_MAX_LIMIT = {  # more is an accident, and more threads end the process without a word
    "max_model_len": 1 << 30,
    "max_batch_tokens": 1 << 20,
    "max_num_seqs": 1 << 20,
    "threads": 1024,
    "block_size": 1 << 16,
}
LOOKAHEAD = 8  # jobs begun beyond the oldest unfinished one, in multiples of what runs at once


class LLM:
    """A model to call from Python: `LLM("path or hub id")`, or `LLM(url="http://host:8000")` for a server.

    The engine's options (`device` to `block_size`) mean nothing with `url`; `api_key` and `timeout` (seconds a
    request may take) mean nothing without. With `url`, `model` may stay None where the server has one model.
    Raises ValueError for an option that is not allowed or a checkpoint that cannot be served, ConnectionError when
    there is no server.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        url: str | None = None,
        device: Device = "auto",
        load: Load = "auto",
        dtype: str = "auto",
        quantization: Literal["fp8"] | None = None,
        max_model_len: int | None = None,
        kv_cache_memory: str | int | None = None,
        kv_cache_dtype: KvDtype = "auto",
        gpu_memory_fraction: float = GPU_MEMORY_FRACTION,
        max_batch_tokens: int | None = None,
        max_num_seqs: int | None = None,
        threads: int | None = None,
        block_size: int = 16,
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        _check_limits(
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            threads=threads,
            block_size=block_size,
        )
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout!r} is not allowed; allowed: seconds, above 0")
        # Imported here: either backend is heavy, and a process needs one.
        if url is not None:
            from baton.llm_remote import RemoteBackend

            self._backend: Backend = RemoteBackend(
                url, model, api_key, timeout, max_in_flight=max_num_seqs or REMOTE_NUM_SEQS
            )
        elif model is not None:
            from baton.llm_local import LocalConfig, local_backend

            config = LocalConfig(
                device=device,
                load=load,
                dtype=dtype,
                quantization=quantization,
                max_model_len=max_model_len,
                kv_cache_memory=kv_cache_memory,
                kv_cache_dtype=kv_cache_dtype,
                gpu_memory_fraction=gpu_memory_fraction,
                max_batch_tokens=max_batch_tokens,
                max_num_seqs=max_num_seqs,
                threads=threads,
                block_size=block_size,
            )
            self._backend = local_backend(model, config)
        else:
            raise ValueError("give LLM a model (path or hub id) or the url of a server")

    @property
    def model(self) -> str:
        """What the model is called: as it was given, or by the server."""
        return self._backend.model

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params | None = None, *, progress: bool = True
    ) -> list[RequestOutput]:
        """Continue every prompt (text or token ids), all in flight together; outputs in the prompts' order.

        One prompt gives a list of one. `params` is for all prompts or one for each. `progress` draws a bar when
        there are several prompts and stderr is a terminal. The first request that fails cancels the others and
        raises; an InvalidRequest says which prompt.
        """
        _check_list("prompts", prompts, "a text, token ids, or a list of these")
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        many = [cast(Prompt, prompts)] if single else list(cast(Sequence[Prompt], prompts))
        return self._all(_jobs(many, params), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """The same for one conversation, or several, through the checkpoint's chat template."""
        _check_list("messages", messages, "a list of messages, or a list of such lists")
        single = bool(messages) and isinstance(messages[0], Mapping)
        many = [cast(Sequence[Message], messages)] if single else list(cast(Sequence[Sequence[Message]], messages))
        return self._all(_jobs([Conversation(each) for each in many], params), progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Increments:
        """The same text as `generate`, as it comes. With `n` choices, their increments arrive interleaved."""
        return self._stream(_job(prompt, params or SamplingParams()))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Increments:
        """The same text as `chat`, as it comes."""
        return self._stream(_job(Conversation(messages), params or SamplingParams()))

    def run(self, jobs: Iterable[Job | Exception]) -> Generator[tuple[int, Ended], None, None]:
        """Run any number of jobs in bounded memory: yields (place of the job, output or error) as each ends.

        Jobs are taken from the iterable only when there is room, and never far beyond the oldest unfinished one,
        so a caller that puts the results in order holds few of them. One failure does not stop the others; an
        exception in the place of a job is its own end.
        """
        ended: SimpleQueue[tuple[int, Ended]] = SimpleQueue()
        under_way: dict[int, Callable[[], None]] = {}  # oldest first
        waiting = enumerate(jobs)
        num_begun = 0
        room = self._backend.max_in_flight
        try:
            while True:
                while len(under_way) < room and num_begun - next(iter(under_way), num_begun) < LOOKAHEAD * room:
                    if (entry := next(waiting, None)) is None:
                        break
                    under_way[entry[0]] = self._begin(*entry, ended)
                    num_begun += 1
                if not under_way:
                    return
                place, end = ended.get()
                del under_way[place]
                yield place, end
        finally:
            for cancel in under_way.values():
                cancel()

    def close(self) -> None:
        """Cancel what is under way and give back memory, threads and connections. May be called twice."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, place: int, job: Job | Exception, ended: SimpleQueue[tuple[int, Ended]]) -> Callable[[], None]:
        if isinstance(job, Exception):
            ended.put((place, job))
            return lambda: None
        return self._backend.complete(job, lambda end: ended.put((place, end)))

    def _all(self, jobs: list[Job], progress: bool) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        console = Console(stderr=True)
        show = progress and len(jobs) > 1 and console.is_terminal
        with throughput_bar(console, len(jobs), enabled=show) as count, closing(self.run(jobs)) as results:
            for place, end in results:
                if isinstance(end, Exception):
                    raise _located(end, place, len(jobs))
                outputs[place] = end
                count(end)
        return [outputs[place] for place in range(len(jobs))]

    def _stream(self, job: Job) -> Increments:
        if job.params.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs is not available with stream", param="prompt_logprobs")
        events: SimpleQueue[Increment | Exception | None] = SimpleQueue()
        cancel = self._backend.stream(job, events.put)
        try:
            while isinstance(event := events.get(), Increment):
                yield event
            if event is not None:
                raise event
        finally:
            cancel()


def _check_limits(**limits: int | None) -> None:
    """Raises ValueError for one that is no count."""
    for name, value in limits.items():
        if value is not None and (type(value) is not int or not 1 <= value <= _MAX_LIMIT[name]):
            raise ValueError(f"{name}: {value!r} is not allowed; allowed: whole numbers from 1 to {_MAX_LIMIT[name]}")


def _check_list(name: str, value: object, wanted: str) -> None:
    """Raises InvalidRequest for what has no length and order."""
    if not isinstance(value, Sequence):
        raise InvalidRequest(f"{name} must be {wanted}, not {value!r:.100}", param=name)


def _jobs(prompts: Sequence[Prompt | Conversation], params: Params | None) -> list[Job]:
    """Raises InvalidRequest for what is no prompt, or no parameters."""
    if params is None or isinstance(params, SamplingParams):
        each: Sequence[SamplingParams] = [params or SamplingParams()] * len(prompts)
    else:
        _check_list("params", params, "SamplingParams, or a list of them")
        each = params
    if len(each) != len(prompts):
        raise InvalidRequest(f"{len(prompts)} prompts came with {len(each)} sampling parameters", param="params")
    jobs = []
    for place, pair in enumerate(zip(prompts, each, strict=True)):
        try:
            jobs.append(_job(*pair))
        except InvalidRequest as error:
            raise _located(error, place, len(prompts)) from None
    return jobs


def _job(prompt: Prompt | Conversation, params: SamplingParams) -> Job:
    """Raises InvalidRequest for another type than these."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {params!r:.100}", param="params")
    if isinstance(prompt, Conversation):
        messages = prompt.messages
        if not isinstance(messages, Sequence) or not all(isinstance(each, Mapping) for each in messages):
            raise InvalidRequest(f"messages must be a list of mappings, not {messages!r:.100}", param="messages")
    elif not isinstance(prompt, str):
        try:
            prompt = tuple(map(index, prompt))
        except TypeError:
            message = f"a prompt must be a text or a list of token ids, not {prompt!r:.100}"
            raise InvalidRequest(message, param="prompt") from None
    return Job(prompt, params)


def _located(error: Exception, place: int, num_jobs: int) -> Exception:
    if num_jobs == 1 or not isinstance(error, InvalidRequest):
        return error
    return InvalidRequest(f"prompt {place}: {error.message}", param=error.param, code=error.code)
