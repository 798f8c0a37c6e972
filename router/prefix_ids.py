"""Token ids of the beginnings of chats, so that of a chat that grew only what is new is tokenized.

Used by `router.prompts`. Exact: a text is cut only behind special tokens that the tokenizer always takes out whole
before it looks at anything else, so what stands before such a cut has no influence on what stands behind it. Bounded
in characters; the least recently used go first. Entries belong to an owner (a tenant), since a hit can be timed.
Safe to use from threads, which long texts are looked through in.
"""

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from router.tokenizer import Tokenizer

MAX_CHARS = 4 * 1024 * 1024  # of all texts kept; their ids take about as many bytes
MIN_CHARS = 1024  # shorter beginnings are not worth a look
MAX_LOOKS = 16  # cuts, from the last backwards: a turn of a chat adds a few


class PrefixIds:
    """`max_chars` 0 keeps nothing. Without special tokens that can be cut at, nothing is ever found."""

    def __init__(self, tokenizer: Tokenizer, max_chars: int = MAX_CHARS) -> None:
        cuts = tokenizer.cut_tokens
        self._ids = frozenset(cuts.values())
        self._pattern = re.compile("|".join(map(re.escape, cuts))) if cuts and max_chars else None
        self._max_chars = max_chars
        self._num_chars = 0
        self._lock = threading.Lock()  # of the two below; the loop wants it too: texts are hashed before it is taken
        self._known: OrderedDict[tuple[str, str], array[int]] = OrderedDict()

    def find(self, owner: str, text: str) -> tuple[Sequence[int], str]:
        """The ids of the longest beginning that is known, and the text behind it."""
        for end in reversed(self._cuts(text)[-MAX_LOOKS:]):
            key = _hashed(owner, text[:end])
            with self._lock:
                ids = self._known.get(key)
                if ids is not None:
                    self._known.move_to_end(key)
                    return ids, text[end:]
        return (), text

    def keep(self, owner: str, text: str, token_ids: Sequence[int]) -> None:
        """Remember `text`, whose ids these are, up to its last cut."""
        cuts = self._cuts(text)
        if not cuts or cuts[-1] > self._max_chars:
            return
        key = _hashed(owner, text[: cuts[-1]])
        if key in self._known:
            return
        end = len(token_ids)
        while token_ids[end - 1] not in self._ids:
            end -= 1
        ids = array("I", token_ids[:end])
        with self._lock:
            if key not in self._known:  # also not by now
                self._known[key] = ids
                self._num_chars += len(key[1])
            while self._num_chars > self._max_chars:
                self._num_chars -= len(self._known.popitem(last=False)[0][1])

    def _cuts(self, text: str) -> list[int]:
        if self._pattern is None or len(text) < MIN_CHARS:
            return []
        return [end for match in self._pattern.finditer(text) if (end := match.end()) >= MIN_CHARS]


def _hashed(owner: str, text: str) -> tuple[str, str]:
    key = (owner, text)
    hash(key)  # which the text keeps
    return key
