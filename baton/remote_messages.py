"""Jobs as bodies of the OpenAI API, and its answers as outputs. Pure; the fields beyond OpenAI's are vLLM's.

`return_token_ids` and `return_tokens_as_token_ids` make the server name tokens by id: text alone does not tell two
tokens apart whose bytes are no whole characters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from baton.outputs import Completion, Conversation, Increment, Job, RequestOutput
from engine.executors.base import TokenLogprobs
from engine.request import SamplingParams

ID_PREFIX = "token_id:"
_DEFAULTS: dict[str, Any] = msgspec.to_builtins(SamplingParams())


def request_body(job: Job, model: str) -> tuple[str, dict[str, Any]]:
    """The route and what to post to it."""
    params: dict[str, Any] = msgspec.to_builtins(job.params, str_keys=True)
    given = {name: value for name, value in params.items() if value != _DEFAULTS[name]}
    # OpenAI's own defaults are the API's, so these are always said.
    given |= {"model": model, "max_tokens": job.params.max_tokens, "temperature": job.params.temperature}
    given |= {"return_token_ids": True}
    if job.params.logprobs is not None:
        given["return_tokens_as_token_ids"] = True
    if not isinstance(job.prompt, Conversation):
        prompt = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
        return "/v1/completions", {**given, "prompt": prompt}
    if job.params.logprobs is not None:
        given |= {"logprobs": True, "top_logprobs": job.params.logprobs}
    return "/v1/chat/completions", {**given, "messages": list(job.prompt.messages)}


def parse_output(job: Job, body: Mapping[str, Any]) -> RequestOutput:
    """Raises ValueError, LookupError or TypeError for what is no answer of this API."""
    choices: Sequence[Mapping[str, Any]] = sorted(body["choices"], key=lambda choice: int(choice["index"]))
    first = choices[0]
    prompt: list[int] = body.get("prompt_token_ids") or first.get("prompt_token_ids") or _known_ids(job)
    scores = body.get("prompt_logprobs") or first.get("prompt_logprobs")
    return RequestOutput(
        prompt_token_ids=prompt,
        outputs=[_completion(job, choice) for choice in choices],
        prompt_logprobs=_prompt_logprobs(job, prompt, scores) if scores else None,
    )


def parse_increment(job: Job, choice: Mapping[str, Any]) -> Increment | None:
    """None for a chunk that says nothing new, such as a chat answer's first."""
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    token_ids, reason = choice.get("token_ids") or [], choice.get("finish_reason")
    if not (text or token_ids or reason):
        return None
    return Increment(
        choice["index"],
        text or "",
        token_ids,
        reason,
        _logprobs(job, token_ids, choice.get("logprobs")),
        choice.get("stop_reason"),
    )


def _completion(job: Job, choice: Mapping[str, Any]) -> Completion:
    token_ids: list[int] = choice.get("token_ids") or []
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    logprobs = _logprobs(job, token_ids, choice.get("logprobs"))
    reason, stop = choice["finish_reason"], choice.get("stop_reason")
    return Completion(choice["index"], text or "", token_ids, reason, logprobs, stop)


def _known_ids(job: Job) -> list[int]:
    return [] if isinstance(job.prompt, str | Conversation) else list(job.prompt)


def _logprobs(job: Job, token_ids: list[int], logprobs: Mapping[str, Any] | None) -> list[TokenLogprobs] | None:
    num_top = job.params.logprobs
    if num_top is None:
        return None
    if not logprobs:
        return []
    if "content" in logprobs:  # chat
        scores = [entry["logprob"] for entry in logprobs["content"]]
        tops = [[(top["token"], top["logprob"]) for top in entry["top_logprobs"]] for entry in logprobs["content"]]
    else:
        scores = logprobs["token_logprobs"]
        tops = [list((top or {}).items()) for top in logprobs["top_logprobs"] or [None] * len(scores)]
    return [
        TokenLogprobs(token_id, score, _by_id(top[:num_top]))  # the sampled token may follow behind the top ones
        for token_id, score, top in zip(token_ids, scores, tops, strict=True)
    ]


def _by_id(top: Sequence[tuple[str, float]]) -> tuple[tuple[int, float], ...]:
    """Alternatives that a server names by text alone are left out: the text does not tell which token it was."""
    return tuple((int(token.removeprefix(ID_PREFIX)), score) for token, score in top if token.startswith(ID_PREFIX))


def _prompt_logprobs(
    job: Job, prompt: Sequence[int], scores: Sequence[Mapping[str, Any] | None]
) -> list[TokenLogprobs | None]:
    num_top = job.params.prompt_logprobs or 0
    parsed: list[TokenLogprobs | None] = []
    for token_id, entry in zip(prompt, scores, strict=True):
        if entry is None:
            parsed.append(None)
            continue
        ranked = sorted((other["rank"], int(key), other["logprob"]) for key, other in entry.items() if other["rank"])
        top = tuple((other, score) for rank, other, score in ranked if rank <= num_top)
        parsed.append(TokenLogprobs(token_id, entry[str(token_id)]["logprob"], top))
    return parsed
