"""How long KV takes to come: calibrated by a decode worker's own pulls, reported to the router."""

# Of past pulls; their weights halve every 34 pulls, so that the rate follows what shares the link.
_FORGETTING = 0.98

# Routers leave a link alone that was slow. While nothing moves, what is said of it and the weight of past pulls halve
# in this time: so it is tried again, and what that shows counts more than what was long ago.
_HALF_LIFE_S = 30.0


class TransferRate:
    """Times are monotonic seconds."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0
        self._used_at = 0.0

    def observe(self, num_tokens: int, seconds: float, now: float) -> None:
        """A pull has moved so many tokens, and was copying for so long."""
        kept = _FORGETTING * self._aged(now)
        self._num_tokens = kept * self._num_tokens + num_tokens
        self._seconds = kept * self._seconds + seconds
        self._used_at = now

    def token_s(self, now: float, *, pulling: bool) -> float:
        """Seconds for each token; 0 while nothing has moved. `pulling`: the link is in use now."""
        if pulling:
            self._used_at = now
        return self._aged(now) * self._seconds / self._num_tokens if self._num_tokens else 0.0

    def _aged(self, now: float) -> float:
        return float(0.5 ** ((now - self._used_at) / _HALF_LIFE_S))
