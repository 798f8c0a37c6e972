"""POST /v1/completions and /v1/chat/completions: from a body to a Job. The handlers of `router.http` call these."""

from collections.abc import Callable, Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.request import MAX_LOGPROBS, Request, RequestId, SamplingParams
from router.answer import Job
from router.choices import Choice
from router.detokenizer import StopStrings, TextStream
from router.errors import ApiError
from router.exchange import REQUEST_ID
from router.generation import ModelCard, RouteHints
from router.params import choice_seed, request_seed, sampling_params
from router.prompts import Prompt, PromptEncoder, truncated
from router.responses import ChatFormat, CompletionFormat, Envelope
from router.schema import ChatBody, CompletionBody, SamplingFields, refuse_unsupported
from router.tokenizer import Tokenizer

MAX_CHOICES = 1024  # of one request: prompts times n
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat may fill the context


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """What a handler knows of a request besides its body."""

    request_id: str
    received: float
    created: int
    deadline: float
    tenant: str  # separates prefix caches; empty without API keys
    timeline: bool
    long: bool  # its body: what is done for it is done in threads
    hints: RouteHints


class Planner:
    """Turns bodies into jobs. Raises InvalidRequest, or ApiError 404 for an unknown model."""

    def __init__(
        self, card: ModelCard, tokenizer: Tokenizer, encoder: PromptEncoder, draw_bits: Callable[[int], int]
    ) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._draw_bits = draw_bits

    async def completion(self, body: CompletionBody, arrival: Arrival) -> Job:
        model = self.check_model(body.model)
        refuse_unsupported(body)
        only_prompt = bool(body.echo) and body.max_tokens == 0
        explicit = 1 if only_prompt else body.max_tokens
        room = self._card.max_model_len - (DEFAULT_MAX_TOKENS if explicit is None else explicit)
        special = body.add_special_tokens is not False
        prompts = await self._encoder.prompts(body.prompt, add_special_tokens=special, long=arrival.long)
        if body.truncate_prompt_tokens is not None:
            prompts = [truncated(prompt, body.truncate_prompt_tokens, room) for prompt in prompts]
        if body.echo:
            prompts = [await self._with_text(prompt, arrival) for prompt in prompts]
        scored = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            scored = max(scored or 0, body.logprobs)
        params = [
            sampling_params(
                body,
                max_tokens=self._max_tokens(prompt, explicit, DEFAULT_MAX_TOKENS, "prompt"),
                logprobs=body.logprobs,
                prompt_logprobs=scored,
                vocab_size=self._card.vocab_size,
            )
            for prompt in prompts
        ]
        envelope = self._envelope("cmpl", body, arrival, model, logprobs=body.logprobs is not None)
        choices = self._choices(envelope.id, prompts, params, body, arrival)
        return Job(
            choices=choices,
            format=CompletionFormat(envelope, self._tokenizer, hide_output=only_prompt),
            envelope=envelope,
            stream=bool(body.stream),
            received=arrival.received,
            deadline=arrival.deadline,
            num_hidden=len(choices) if only_prompt else 0,
        )

    async def chat(self, body: ChatBody, arrival: Arrival) -> Job:
        model = self.check_model(body.model)
        refuse_unsupported(body)
        _check_chat(body)
        explicit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        special, salt = body.add_special_tokens is True, _salt(body, arrival)
        prompt = await self._encoder.chat(body, add_special_tokens=special, owner=salt, long=arrival.long)
        room = self._card.max_model_len - (1 if explicit is None else explicit)
        if body.truncate_prompt_tokens is not None:
            prompt = truncated(prompt, body.truncate_prompt_tokens, room)
        left = max(1, self._card.max_model_len - len(prompt.token_ids))
        params = sampling_params(
            body,
            max_tokens=self._max_tokens(prompt, explicit, left, "messages"),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            vocab_size=self._card.vocab_size,
        )
        envelope = self._envelope("chatcmpl", body, arrival, model, logprobs=bool(body.logprobs))
        return Job(
            choices=self._choices(envelope.id, [prompt], [params], body, arrival),
            format=ChatFormat(envelope, self._tokenizer),
            envelope=envelope,
            stream=bool(body.stream),
            received=arrival.received,
            deadline=arrival.deadline,
        )

    def check_model(self, name: str | None) -> str:
        """The model's name as the client wrote it."""
        if not name or name == self._card.name or name in self._card.aliases:
            return name or self._card.name
        message = f"the model {name[:200]!r} does not exist"
        raise ApiError(404, message, "not_found_error", param="model", code="model_not_found")

    async def _with_text(self, prompt: Prompt, arrival: Arrival) -> Prompt:
        if prompt.text is not None:
            return prompt
        text = await self._encoder.decode(prompt.token_ids, skip_special_tokens=True, long=arrival.long)
        return Prompt(prompt.token_ids, text)

    def _max_tokens(self, prompt: Prompt, explicit: int | None, default: int, param: str) -> int:
        """Raises InvalidRequest when prompt and output do not fit into the context together."""
        limit, num_prompt = self._card.max_model_len, len(prompt.token_ids)
        num_output = max(1, min(default, limit - num_prompt)) if explicit is None else explicit
        if num_prompt + max(1, num_output) <= limit:
            return num_output
        raise InvalidRequest(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{num_prompt + num_output} tokens ({num_prompt} in the {param}, {num_output} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )

    def _choices(
        self,
        answer_id: str,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        body: SamplingFields,
        arrival: Arrival,
    ) -> list[Choice]:
        n = params[0].n
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidRequest(f"prompts times n must be at most {MAX_CHOICES}", param="n")
        salt = _salt(body, arrival)
        stops = StopStrings(params[0].stop)
        choices: list[Choice] = []
        for prompt, each in zip(prompts, params, strict=True):
            leader, seed = None, request_seed(each, self._draw_bits)
            for i in range(n):
                request = Request(
                    id=RequestId(f"{answer_id}-{len(choices)}"),
                    token_ids=prompt.token_ids,
                    num_prompt_tokens=len(prompt.token_ids),
                    params=each,
                    seed=choice_seed(seed, i),
                    priority=body.priority or 0,
                    tenant=arrival.hints.tenant,
                    cache_salt=salt,
                )
                text = TextStream(self._tokenizer, each, prompt.token_ids, stops=stops)
                choice = Choice(len(choices), prompt, request, text, arrival.hints, leader)
                leader = leader or choice
                choices.append(choice)
        return choices

    def _envelope(self, kind: str, body: SamplingFields, arrival: Arrival, model: str, *, logprobs: bool) -> Envelope:
        options = body.stream_options
        own = body.request_id if body.request_id and REQUEST_ID.fullmatch(body.request_id.encode()) else ""
        return Envelope(
            id=f"{kind}-{own or arrival.request_id}",
            created=arrival.created,
            model=model,
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs is not None and not body.stream,
            token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            echo=isinstance(body, CompletionBody) and bool(body.echo),
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
            timeline=arrival.timeline,
        )


def _salt(body: SamplingFields, arrival: Arrival) -> str:
    """Requests with different salts share nothing that is cached."""
    return f"{arrival.tenant}/{body.cache_salt or ''}" if arrival.tenant else body.cache_salt or ""


def _check_chat(body: ChatBody) -> None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        message = f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {body.top_logprobs}"
        raise InvalidRequest(message, param="top_logprobs")
    if body.tool_choice not in (None, "none", "auto"):
        message = "tool_choice must be none or auto: tool calls are not parsed"
        raise InvalidRequest(message, param="tool_choice", code="unsupported_parameter")
    if body.modalities not in (None, ["text"]):
        raise InvalidRequest("modalities must be text", param="modalities", code="unsupported_parameter")
