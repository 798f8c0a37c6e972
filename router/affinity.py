"""Where the turns of a session went: what a worker is about to hold before its KV events say so.

A client that names its session (X-Session-ID) has its next turn begin with the one before it. While that one runs, and
shortly after, the index does not know its last blocks yet; they are counted as cached where it went. Later the index
alone is believed, for what it does not have by then was evicted. A name alone is not believed: the hash of the last
turn's last whole block has to stand at the same place in the new prompt.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_SESSIONS = 1 << 16
_FRESH_S = 2.0  # after a turn has ended: well above the delay of a KV event


@dataclass(slots=True, eq=False)
class Turn:
    prefill: str | None
    decode: str
    num_prompt_tokens: int
    block_size: int
    num_blocks: int  # whole ones of the prompt
    last_hash: int  # of those
    num_output_tokens: int = 0  # that have KV
    fresh_until: float = float("inf")  # while it runs

    def ended(self, num_output_tokens: int, now: float) -> None:
        """The answer lies on the decode worker, without its last token."""
        self.num_output_tokens = max(0, num_output_tokens - 1)
        self.fresh_until = now + _FRESH_S

    def held(self) -> Iterator[tuple[str, int]]:
        """(worker, tokens of the session it holds or soon will)."""
        if self.prefill is not None:
            yield self.prefill, self.num_prompt_tokens
        yield self.decode, self.num_prompt_tokens + self.num_output_tokens


class Affinity:
    """The last turn of each session, of the sessions seen last. Keys are (tenant, session)."""

    def __init__(self) -> None:
        self._turns: OrderedDict[tuple[str, str], Turn] = OrderedDict()

    def placed(self, key: tuple[str, str], turn: Turn) -> None:
        self._turns[key] = turn
        self._turns.move_to_end(key)
        if len(self._turns) > _MAX_SESSIONS:
            self._turns.popitem(last=False)

    def last(self, key: tuple[str, str], now: float) -> Turn | None:
        """While the index may not know it yet."""
        turn = self._turns.get(key)
        return turn if turn is not None and now <= turn.fresh_until else None
