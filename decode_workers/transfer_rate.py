"""How long KV takes to come: calibrated by a decode worker's own pulls, reported to the router."""

# Of past pulls; their weights halve every 34 pulls, so that the rate follows what shares the link.
_FORGETTING = 0.98


class TransferRate:
    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A pull has moved so many tokens, and was copying for so long."""
        self._num_tokens = _FORGETTING * self._num_tokens + num_tokens
        self._seconds = _FORGETTING * self._seconds + seconds

    @property
    def token_s(self) -> float:
        """Seconds for each token; 0 while nothing has moved."""
        return self._seconds / self._num_tokens if self._num_tokens else 0.0
