"""What a client asks of the engine: a request and its sampling parameters. No torch here."""

from enum import StrEnum
from typing import NewType

import msgspec

from engine.errors import InvalidRequest

RequestId = NewType("RequestId", str)

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_N = 128
SEED_MASK = (1 << 64) - 1


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. Names and defaults are vLLM's, except that `top_k` 0 means off.

    With `seed` set, the same prompt gives the same text on any worker, in any batch; the i-th of
    `n` choices uses its own seed derived from it. `logprobs` counts the alternatives returned
    beside each sampled token (0: the token alone, None: nothing), `prompt_logprobs` likewise for
    the prompt. Stop strings are matched on decoded text and cut from it.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Sampling depends on the tokens before."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequest naming the first field outside its range."""
        for name, value, low, high in (
            ("max_tokens", self.max_tokens, 1, 1 << 31),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 0, 1 << 31),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("seed", self.seed or 0, -(1 << 63), SEED_MASK),
            ("n", self.n, 1, MAX_N),
            ("stop", len(self.stop), 0, MAX_STOPS),
            ("stop_token_ids", len(self.stop_token_ids), 0, MAX_STOPS),
            ("logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS),
            ("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_LOGPROBS),
        ):
            if not low <= value <= high:  # NaN neither
                raise InvalidRequest(f"{name} must be between {low} and {high}, not {str(value)[:32]}", param=name)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be greater than 0", param="top_p")
        if any(not stop or len(stop) > MAX_STOP_LENGTH for stop in self.stop):
            raise InvalidRequest(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if any(not 0 <= token_id < vocab_size for token_id in ids):
                raise InvalidRequest(f"{name} holds a token id outside 0..{vocab_size - 1}", param=name)
        if any(not -100.0 <= bias <= 100.0 for bias in self.logit_bias.values()):
            raise InvalidRequest("logit_bias values must be between -100 and 100", param="logit_bias")


class Request(msgspec.Struct, frozen=True):
    """One sequence to continue.

    `token_ids` is the prompt followed by what an earlier attempt already produced (the first
    `num_prompt_tokens` are the prompt), so a request that moved to another worker goes on where it
    was. `params.n` is ignored here: the router makes one Request for each choice. `params.max_tokens`
    and `min_tokens` count from the end of the prompt.
    """

    id: RequestId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # 0 <= seed < 2**64
    priority: int = 0  # lower is earlier
    tenant: str = ""  # who shares the workers fairly with others
    cache_salt: str = ""
    adapter: str = ""
