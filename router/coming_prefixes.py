"""What workers are about to hold: beginnings of prompts on their way, which the index cannot know yet.

Owned by the placement, which asks beside the index. Requests that come together and begin alike, as those of several
agents at work on one document do, would otherwise each be taken for new work, wherever they go. Whoever computes one of
them is believed to hold its beginning, from the decision on, or from when the worker tells of another router's, until a
moment after its first token is expected; then the index knows. It is only a guess: a sample of the blocks is looked at
(engine/kv/block_hash.py), and of what is computed on many workers only some are remembered.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from engine.kv.block_hash import sample_blocks

_MAX_PROMPTS = 8  # of those that have a block; more would cost each decision time and win nobody any
_LATE_S = 2.0  # after the first token is expected
_MAX_EXPIRED = 4  # prompts in one call: after a pause many are over at once


class ComingPrompt:
    """What one worker was told of at one time; who has it may `drop` it."""

    __slots__ = ("alone", "hashes", "worker_id")

    def __init__(self, worker_id: str, hashes: Sequence[int]) -> None:
        self.worker_id = worker_id
        self.hashes = hashes
        self.alone: tuple[ComingPrompt, ...] = (self,)  # what is kept for blocks of no other


class ComingPrefixes:
    """Times are by one clock."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[ComingPrompt, ...]] = {}  # by block, the latest last
        self._ends: list[tuple[float, int, ComingPrompt]] = []  # heap
        self._numbers = count()

    def expect(self, worker_id: str, hashes: Sequence[int], seconds: float, now: float) -> ComingPrompt | None:
        """A worker is going to compute these blocks, a sample of a prompt's or of several, in so many seconds. None: it
        is no news."""
        self._expire(now)
        prompts, others = self._prompts, {}
        if not prompts.keys().isdisjoint(hashes):
            others = {each: having for each in hashes if (having := prompts.get(each)) is not None}
            # What it was going to compute already is no news.
            known = {each for each, having in others.items() if any(other.worker_id == worker_id for other in having)}
            hashes = [each for each in hashes if each not in known]
        if not hashes:
            return None
        prompt = ComingPrompt(worker_id, hashes)
        prompts.update(dict.fromkeys(hashes, prompt.alone))
        for block_hash in hashes if others else ():
            if block_hash in others:
                prompts[block_hash] = (*others[block_hash][1 - _MAX_PROMPTS :], prompt)
        heappush(self._ends, (now + seconds + _LATE_S, next(self._numbers), prompt))
        return prompt

    def find(self, sample: Sequence[int], block_size: int, now: float) -> dict[str, int]:
        """Tokens that each worker soon holds of a prompt, whose full blocks these are a sample of."""
        self._expire(now)
        prompts = self._prompts
        if prompts.keys().isdisjoint(sample):
            return {}
        found: dict[str, int] = {}
        size = sample_blocks(block_size) * block_size
        for place, block_hash in enumerate(sample, 1):
            for prompt in prompts.get(block_hash, ()):
                found[prompt.worker_id] = place * size
        return found

    def forget(self, worker_id: str) -> None:
        """It has lost what it was about to hold."""
        for _, _, prompt in self._ends:
            if prompt.worker_id == worker_id:
                self.drop(prompt)
        self._ends = [end for end in self._ends if end[2].worker_id != worker_id]
        heapify(self._ends)

    def drop(self, prompt: ComingPrompt) -> None:
        """It is over, or will not be computed. Idempotent."""
        prompts, alone = self._prompts, prompt.alone
        for block_hash in prompt.hashes:
            having = prompts.pop(block_hash, alone)
            if having is not alone and (left := tuple(each for each in having if each is not prompt)):
                prompts[block_hash] = left
        prompt.alone = prompt.hashes = ()  # it has been one of its own

    def _expire(self, now: float) -> None:
        for _ in range(_MAX_EXPIRED):
            if not self._ends or self._ends[0][0] > now:
                return
            self.drop(heappop(self._ends)[2])
