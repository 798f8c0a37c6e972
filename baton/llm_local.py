"""The engine in this process: one thread owns it, callers post jobs to it and hear of every token.

Used by `baton.llm`. Tokens become text on the engine's thread, so that a stop string ends its sequence before another
token is computed. A job's sequences are in the engine from `_begin` until each has finished or `_cancel` was called.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from secrets import randbits
from threading import Thread
from traceback import clear_frames
from typing import Literal

from rich.console import Console

from baton.device import find_device
from baton.outputs import Completion, Conversation, Increment, Job, OnEnd, OnEvent, RequestOutput
from baton.progress import loading_bar
from baton.tokenizer import checkpoint_tokenizer
from cluster.checkpoint import resolve_model
from cluster.devices import Device, kv_bytes, step_limits
from cluster.spec import KvDtype, Load, parse_size
from engine.engine import Engine, TokenOutput
from engine.errors import InvalidRequest
from engine.executors.base import Executor, TokenLogprobs
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.inbox import Inbox
from engine.request import FinishReason, Request, RequestId
from engine.scheduler import SchedulerConfig
from router.detokenizer import TextStream
from router.params import choice_seed, request_seed
from router.prompts import check_ids, render_messages
from router.tokenizer import Tokenizer

IDLE_WAIT_S = 3600.0  # an idle engine wakes up only for a command
CLOSE_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """None of memory and limits: what suits the device."""

    device: Device
    load: Load
    dtype: str
    quantization: Literal["fp8"] | None
    max_model_len: int | None
    kv_cache_memory: str | int | None
    kv_cache_dtype: KvDtype
    gpu_memory_fraction: float
    max_batch_tokens: int | None
    max_num_seqs: int | None
    threads: int | None
    block_size: int


def local_backend(model: str, config: LocalConfig) -> "LocalBackend":
    """Load the checkpoint. Raises ValueError when it cannot be served with this configuration."""
    path: Path = resolve_model(model, config.load)
    asked = None if config.kv_cache_memory is None else parse_size(config.kv_cache_memory)
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise ValueError(f"kv_cache_memory must be a size such as 512MiB, not {config.kv_cache_memory!r}")
    device = find_device(config.device)
    limits = SchedulerConfig(*step_limits(device, config.max_batch_tokens, config.max_num_seqs))
    tokenizer = checkpoint_tokenizer(path, config.load)
    sizes = TorchConfig(
        device=device,
        load=config.load,
        dtype=config.dtype,
        quantization=config.quantization,
        block_size=config.block_size,
        kv_memory=kv_bytes(device, asked),
        kv_dtype=config.kv_cache_dtype,
        gpu_memory_fraction=config.gpu_memory_fraction,
        max_model_len=config.max_model_len,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
        num_threads=config.threads,
    )
    with loading_bar(Console(stderr=True)) as progress:
        executor = TorchExecutor(path, sizes, progress)
    return LocalBackend(model, executor, limits, tokenizer, randbits)


class LocalBackend:
    """Implements `baton.outputs.Backend`. Owns executor, engine and thread until `close`."""

    def __init__(
        self,
        model: str,
        executor: Executor,
        limits: SchedulerConfig,
        tokenizer: Tokenizer,
        draw_bits: Callable[[int], int],
    ) -> None:
        self.model = model
        self.max_in_flight = 2 * limits.max_num_seqs  # one batch runs, the next is ready
        self._executor = executor
        self._engine = Engine(executor, limits, secret="", model=executor.model_hash)  # nobody to keep apart
        self._tokenizer = tokenizer
        self._draw_bits = draw_bits
        self._names = count()
        self._inbox: Inbox[Callable[[], None]] = Inbox()
        self._commands: deque[Callable[[], None]] = deque()  # taken from the inbox
        self._active: dict[RequestId, _Choice] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._thread = Thread(target=self._run, name="baton-engine", daemon=True)
        self._thread.start()

    def complete(self, job: Job, on_end: OnEnd) -> Callable[[], None]:
        return self._start(job, on_end, lambda _increment: None)

    def stream(self, job: Job, on_event: OnEvent) -> Callable[[], None]:
        return self._start(job, lambda end: on_event(end if isinstance(end, Exception) else None), on_event)

    def close(self) -> None:
        self._inbox.post(self._close)
        self._thread.join(CLOSE_WAIT_S)
        if not self._thread.is_alive():  # else what its step uses must not be closed
            self._obey(0.0)
            self._executor.close()

    def _start(self, job: Job, on_end: OnEnd, on_increment: Callable[[Increment], None]) -> Callable[[], None]:
        if not self._thread.is_alive():
            on_end(RuntimeError("the LLM was closed"))
            return lambda: None
        try:
            prompt = self._token_ids(job)
            if not prompt:
                raise InvalidRequest("prompt must not be empty", param="prompt", code="empty_prompt")
            check_ids(prompt, self._executor.vocab_size, "prompt")
            job.params.check(self._executor.vocab_size)
            self._check_length(prompt, job.params.max_tokens)
        except InvalidRequest as error:
            on_end(error)
            return lambda: None
        generation = _Generation(prompt, on_end, on_increment)
        seed = request_seed(job.params, self._draw_bits)
        for index in range(job.params.n):
            request_id = RequestId(f"local-{next(self._names)}")
            request = Request(request_id, prompt, len(prompt), job.params, choice_seed(seed, index))
            generation.choices.append(_Choice(generation, index, request, self._tokenizer))
        self._inbox.post(partial(self._begin, generation))
        if not self._thread.is_alive():  # closed meanwhile, and nobody else takes the command
            for command in self._inbox.take(0.0):
                command()
        return partial(self._inbox.post, partial(self._cancel, generation))

    def _token_ids(self, job: Job) -> tuple[int, ...]:
        if isinstance(job.prompt, Conversation):
            text = render_messages(self._tokenizer, job.prompt.messages)
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if isinstance(job.prompt, str):
            return tuple(self._tokenizer.encode(job.prompt))
        return tuple(job.prompt)

    def _check_length(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        limit = self._executor.max_model_len
        if len(prompt) + max_tokens > limit:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}: together more than the model's "
                f"{limit}",
                param="prompt",
                code="context_length_exceeded",
            )

    # From here on everything runs on the engine's thread.

    def _run(self) -> None:
        wait = IDLE_WAIT_S
        try:
            while not self._closing:
                self._obey(wait)
                scheduled = self._engine.schedule()
                if scheduled is not None:
                    self._engine.start(scheduled)
                is_busy = self._engine.num_in_flight > 0  # what is collected may let others run
                if scheduled is None or not self._engine.can_start:
                    for token in self._engine.collect():
                        self._deliver(token)
                wait = 0.0 if scheduled is not None or is_busy else IDLE_WAIT_S
            while self._engine.num_in_flight:  # they still use the memory that `close` gives back
                self._engine.collect()
            self._fail(RuntimeError("the LLM was closed"))
        except Exception as error:  # the thread's one guard: whoever waits for a token must hear of it
            self._fail(error)

    def _obey(self, wait: float) -> None:
        """Run the commands posted so far; those behind one that raises come first the next time."""
        self._commands += self._inbox.take(0.0 if self._commands else wait)
        while self._commands:
            self._commands.popleft()()

    def _begin(self, generation: "_Generation") -> None:
        if self._failure is not None:
            generation.on_end(self._failure)
            return
        try:
            self._submit(generation.choices[0])
        except InvalidRequest as error:
            del self._active[generation.choices[0].request.id]
            generation.on_end(error)

    def _submit(self, choice: "_Choice") -> None:
        self._active[choice.request.id] = choice  # first, so that it hears of any failure
        self._engine.submit(choice.request)

    def _deliver(self, token: TokenOutput) -> None:
        choice = self._active.get(token.request_id)
        if choice is None:  # ended between two steps
            return
        generation = choice.generation
        if token.prompt_logprobs is not None:
            generation.prompt_logprobs = [None, *token.prompt_logprobs]
        if not generation.begun:
            generation.begun = True
            for other in generation.choices[1:]:  # only now, so that they find the prompt in the prefix cache
                self._submit(other)
        generation.on_increment(choice.push(token))
        if choice.finish_reason is not None:
            del self._active[token.request_id]
            if token.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._engine.cancel(token.request_id)
            if all(other.finish_reason for other in generation.choices):
                generation.on_end(generation.output())

    def _cancel(self, generation: "_Generation") -> None:
        for choice in generation.choices:
            if self._active.pop(choice.request.id, None) is not None:
                self._engine.cancel(choice.request.id)

    def _close(self) -> None:
        self._closing = True

    def _fail(self, error: Exception) -> None:
        """Tell everyone who waits, and everyone who comes."""
        self._failure = error
        clear_frames(error.__traceback__)  # what failed in the executor holds tensors there, and the model
        for generation in {id(choice.generation): choice.generation for choice in self._active.values()}.values():
            generation.on_end(error)
        self._active.clear()
        while not self._closing:
            self._obey(IDLE_WAIT_S)


class _Generation:
    """One job in the engine: a sequence for each of its choices."""

    def __init__(self, prompt: tuple[int, ...], on_end: OnEnd, on_increment: Callable[[Increment], None]) -> None:
        self.prompt = prompt
        self.on_end = on_end
        self.on_increment = on_increment
        self.choices: list[_Choice] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.begun = False  # the first choice has its first token

    def output(self) -> RequestOutput:
        return RequestOutput(list(self.prompt), [choice.completion() for choice in self.choices], self.prompt_logprobs)


class _Choice:
    """One sequence, and what came of it so far. `finish_reason` is set with its last token."""

    def __init__(self, generation: _Generation, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.generation = generation
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, request.params, request.token_ids)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self._stop_reason: str | int | None = None

    def push(self, token: TokenOutput) -> Increment:
        text = self._stream.push([token.token_id], token.finish_reason)
        self._texts.append(text)
        self._token_ids.append(token.token_id)
        if self._logprobs is not None and token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        self.finish_reason = FinishReason.STOP if self._stream.stopped else token.finish_reason
        if self._stream.stopped:
            self._stop_reason = self._stop_string()
        elif self.finish_reason is FinishReason.STOP and token.token_id in self.request.params.stop_token_ids:
            self._stop_reason = token.token_id
        logprobs = None if self._logprobs is None else self._logprobs[-1:]
        return Increment(self._index, text, [token.token_id], self._reason(), logprobs, self._stop_reason)

    def completion(self) -> Completion:
        return Completion(
            self._index, "".join(self._texts), self._token_ids, self._reason(), self._logprobs, self._stop_reason
        )

    def _reason(self) -> str | None:
        return None if self.finish_reason is None else self.finish_reason.value

    def _stop_string(self) -> str | None:
        params = self.request.params
        text = "".join(self._texts)
        if params.include_stop_str_in_output:
            return max((stop for stop in params.stop if text.endswith(stop)), key=len, default=None)
        decoder = self._tokenizer.decoder(skip_special_tokens=params.skip_special_tokens, prompt=self.request.token_ids)
        whole = decoder.push(self._token_ids) + decoder.finish()
        return min((stop for stop in params.stop if whole.startswith(stop, len(text))), key=len, default=None)
