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
        self._trust = 1.0  # in what past pulls say, until the next one says it again
        self._idle_since: float | None = None  # None: the link is in use, or was never

    def observe(self, num_tokens: int, seconds: float, now: float) -> None:
        """A pull has moved so many tokens, and was copying for so long."""
        self._use(now)
        self._num_tokens = _FORGETTING * self._num_tokens + num_tokens
        self._seconds = _FORGETTING * self._seconds + seconds
        self._trust = 1.0
        self._idle_since = now

    def token_s(self, now: float, *, pulling: bool) -> float:
        """Seconds for each token; 0 while nothing has moved. `pulling`: the link is in use now."""
        if pulling:
            self._use(now)
        elif self._idle_since is None:
            self._idle_since = now
        return self._trust * self._left(now) * self._seconds / self._num_tokens if self._num_tokens else 0.0

    def _use(self, now: float) -> None:
        left, self._idle_since = self._left(now), None
        self._num_tokens *= left
        self._seconds *= left
        self._trust *= left

    def _left(self, now: float) -> float:
        return 1.0 if self._idle_since is None else float(0.5 ** ((now - self._idle_since) / _HALF_LIFE_S))
