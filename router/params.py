"""From request fields to sampling parameters, with vLLM's names and the defaults of OpenAI's API."""

from collections.abc import Callable

import xxhash

from engine.errors import InvalidRequest
from engine.request import SEED_MASK, SamplingParams
from router.schema import SamplingFields

MAX_CACHE_SALT = 1024
MAX_STOP_CHARS = 8192  # of all stop strings together
PRIORITIES = range(-(1 << 31), 1 << 31)

# Names and types that fields and parameters share; None keeps the parameter's default.
_SAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


def sampling_params(
    fields: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    vocab_size: int,
) -> SamplingParams:
    """Raises InvalidRequest naming the first field that is out of range or contradicts another."""
    given = {name: value for name in _SAME if (value := getattr(fields, name)) is not None}
    params = SamplingParams(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        top_k=0 if fields.top_k in (None, -1) else fields.top_k,
        stop=(fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ()),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
    )
    params.check(vocab_size)
    _check_rest(fields, params)
    return params


def _check_rest(fields: SamplingFields, params: SamplingParams) -> None:
    if sum(map(len, params.stop)) > MAX_STOP_CHARS:
        raise InvalidRequest(f"stop must have at most {MAX_STOP_CHARS} characters in all", param="stop")
    if fields.best_of is not None and fields.best_of != params.n:
        raise InvalidRequest("best_of must equal n: choices are not ranked", param="best_of")
    if fields.stream and fields.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream", param="prompt_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    if fields.cache_salt is not None and not 1 <= len(fields.cache_salt) <= MAX_CACHE_SALT:
        raise InvalidRequest(f"cache_salt must have 1 to {MAX_CACHE_SALT} characters", param="cache_salt")
    if fields.priority is not None and fields.priority not in PRIORITIES:
        raise InvalidRequest("priority must be a 32-bit integer", param="priority")
    if fields.response_format not in (None, {"type": "text"}):
        message = "response_format must be text: guided decoding is not supported"
        raise InvalidRequest(message, param="response_format", code="unsupported_parameter")


def choice_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of several choices: the first one's is the seed itself, modulo 2**64."""
    seed &= SEED_MASK
    return seed if index == 0 else xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"), seed=seed)


def request_seed(params: SamplingParams, draw_bits: Callable[[int], int]) -> int:
    return draw_bits(64) if params.seed is None else params.seed
