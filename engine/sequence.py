"""The state of one request inside a worker, from submit to its last token.

Owned by the engine. Waiting: no blocks, nothing computed. Running: `block_ids` cover all tokens known at admission
and grow one at a time; `num_computed_tokens` of them hold KV, or will when the steps in flight have run. Preempted:
waiting again, with its tokens kept. Of a token that a step in flight samples only the number is known: it is pending.
"""

from collections.abc import Sequence as ReadOnly

from engine.executors.base import SampleSpec, TokenLogprobs
from engine.kv.block_hash import block_hashes
from engine.kv.layout import BlockId
from engine.request import FinishReason, Request


class Sequence:
    """`turn` is where it begins among the tenants' prompts, `arrival` its number. `hash_seed` starts the chain of block
    hashes; `max_len` is the longest sequence the worker can hold.

    `decodes` False: it leaves the engine with its next token.
    """

    __slots__ = (
        "_sample_spec",
        "_short_spec",
        "arrival",
        "block_ids",
        "hash_seed",
        "hashes",
        "key",
        "max_planned_tokens",
        "max_total_tokens",
        "min_total_tokens",
        "num_computed_tokens",
        "num_likely_tokens",
        "num_pending",
        "num_preemptions",
        "pending_row",
        "prompt_logprobs",
        "request",
        "running",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        turn: int,
        arrival: int,
        *,
        hash_seed: int,
        hashes: list[int],
        eos_token_ids: ReadOnly[int],
        max_len: int,
        decodes: bool = True,
    ) -> None:
        params = request.params
        self.request = request
        self.arrival = arrival
        self.key = (request.priority, turn, arrival)  # order of everything: lower first
        self.token_ids = list(request.token_ids)
        self.hash_seed = hash_seed
        self.hashes = hashes  # of full blocks, at least of those computed
        self.block_ids: list[BlockId] = []
        self.num_computed_tokens = 0
        self.num_likely_tokens = 0  # while it waits: those likely to be cached by its turn
        self.num_pending = 0
        self.pending_row = 0  # of the step submitted last, where the newest pending token is sampled
        self.num_preemptions = 0
        self.running = False
        self.prompt_logprobs: list[TokenLogprobs] = []  # so far
        self.min_total_tokens = request.num_prompt_tokens + params.min_tokens
        self.max_total_tokens = min(request.num_prompt_tokens + params.max_tokens, max_len)
        self.max_planned_tokens = self.max_total_tokens if decodes else len(request.token_ids) + 1
        self.stop_token_ids = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)))
        # They look at the growing list itself, so one for the whole life is enough.
        self._sample_spec = SampleSpec(params, request.seed, self.token_ids, request.num_prompt_tokens)
        self._short_spec = SampleSpec(
            params, request.seed, self.token_ids, request.num_prompt_tokens, tuple(sorted(self.stop_token_ids))
        )

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Output known so far, earlier attempts included."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They come with the first output token, so whoever has output has got them."""
        return self.request.params.prompt_logprobs is not None and self.num_tokens == self.request.num_prompt_tokens

    @property
    def sample_spec(self) -> SampleSpec:
        """How to sample the token after the pending ones."""
        return self._short_spec if self.num_tokens < self.min_total_tokens else self._sample_spec

    @property
    def must_know_tokens(self) -> bool:
        """A pending token has to be read before the next can be sampled."""
        return self.num_pending > 0 and self.request.params.has_penalties

    def append(self, token_id: int) -> FinishReason | None:
        """Take the oldest pending token; the reason to finish if it is the last."""
        self.num_pending -= 1
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_total_tokens else None

    def extend_hashes(self, block_size: int, num_tokens: int) -> None:
        """Hash the full blocks of the first `num_tokens` that have no hash yet."""
        start = len(self.hashes) * block_size
        end = num_tokens // block_size * block_size
        if start < end:
            link = self.hashes[-1] if self.hashes else self.hash_seed
            self.hashes += block_hashes(self.token_ids[start:end], block_size, link)

    def forget_computed(self) -> list[BlockId]:
        """Back to the state before admission; the caller releases the blocks returned."""
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed_tokens = 0
        self.prompt_logprobs = []
        return block_ids
