"""What this router's requests ask of the cluster, smoothed over a minute: how fast they come, what they take, how long
their answers are. Pure; times are given."""

import math

WINDOW_S = 60.0
_MIN_ELAPSED_S = 1.0  # before that a rate would be a guess from one or two requests
_OUTPUT_WEIGHT = 1 / 128  # of the newest answer in the mean length
_FIRST_OUTPUT = 256.0  # taken for the mean until answers have ended


class Rate:
    """Amount per second, older amounts weighing less; exact from the first second on for a steady flow."""

    def __init__(self) -> None:
        self._sum = 0.0  # of the amounts, decayed
        self._began: float | None = None
        self._last = 0.0

    def add(self, amount: float, now: float) -> None:
        if self._began is None:
            self._began = self._last = now
        self._sum = self._sum * math.exp((self._last - now) / WINDOW_S) + amount
        self._last = now

    def per_second(self, now: float) -> float:
        if self._began is None:
            return 0.0
        elapsed = max(_MIN_ELAPSED_S, now - self._began)
        covered = WINDOW_S * (1.0 - math.exp(-elapsed / WINDOW_S))
        return self._sum * math.exp((self._last - now) / WINDOW_S) / covered


class Demand:
    def __init__(self) -> None:
        self.mean_output = _FIRST_OUTPUT  # tokens of an answer
        self._prefills = Rate()
        self._prefill_s = Rate()

    def placed(self, prefill_s: float, now: float) -> None:
        """A request went to a prefill worker, for so many seconds of work."""
        self._prefills.add(1.0, now)
        self._prefill_s.add(prefill_s, now)

    def ended(self, num_output_tokens: int) -> None:
        self.mean_output += _OUTPUT_WEIGHT * (max(1, num_output_tokens) - self.mean_output)

    def prefills_per_s(self, now: float) -> float:
        return self._prefills.per_second(now)

    def prefill_load(self, now: float) -> float:
        """Prefill workers that this router's requests keep busy."""
        return self._prefill_s.per_second(now)
