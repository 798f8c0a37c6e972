"""Where the turns of a session went: what a worker is about to hold before its KV events say so.

A client that names its session (X-Session-ID) promises that a turn begins with the one before it. While that one runs,
and shortly after, the index does not know its last blocks yet; they are counted as cached where it went. Later the
index alone is believed, for what it does not have by then was evicted.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_SESSIONS = 1 << 16
_FRESH_S = 2.0  # after a turn has ended: well above the delay of a KV event


@dataclass(slots=True)
class _Turn:
    prefill: str | None
    decode: str
    num_prompt_tokens: int
    num_output_tokens: int  # that have KV
    fresh_until: float  # infinite while it runs


class Affinity:
    """The last turn of each session, of the sessions seen last. Keys are (tenant, session)."""

    def __init__(self) -> None:
        self._turns: OrderedDict[tuple[str, str], _Turn] = OrderedDict()

    def placed(self, key: tuple[str, str], prefill: str | None, decode: str, num_prompt_tokens: int) -> None:
        self._turns[key] = _Turn(prefill, decode, num_prompt_tokens, 0, float("inf"))
        self._turns.move_to_end(key)
        if len(self._turns) > _MAX_SESSIONS:
            self._turns.popitem(last=False)

    def ended(self, key: tuple[str, str], num_output_tokens: int, now: float) -> None:
        """The answer lies on the decode worker, without its last token."""
        turn = self._turns.get(key)
        if turn is not None:
            turn.num_output_tokens = max(0, num_output_tokens - 1)
            turn.fresh_until = now + _FRESH_S

    def held(self, key: tuple[str, str], now: float) -> Iterator[tuple[str, int]]:
        """(worker, tokens of the session it holds or soon will)."""
        turn = self._turns.get(key)
        if turn is not None and now <= turn.fresh_until:
            if turn.prefill is not None:
                yield turn.prefill, turn.num_prompt_tokens
            yield turn.decode, turn.num_prompt_tokens + turn.num_output_tokens
