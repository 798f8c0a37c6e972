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


class PrefillDemand:
    """Of the prompts that one pool computes."""

    def __init__(self) -> None:
        self._prompts = Rate()
        self._work_s = Rate()

    def placed(self, work_s: float, now: float) -> None:
        """A prompt came, of so many seconds of work."""
        self._prompts.add(1.0, now)
        self._work_s.add(work_s, now)

    def prompts_per_s(self, now: float) -> float:
        return self._prompts.per_second(now)

    def busy_workers(self, now: float) -> float:
        """That the prompts keep busy."""
        return self._work_s.per_second(now)


class Demand:
    def __init__(self) -> None:
        self.mean_output = _FIRST_OUTPUT  # tokens of an answer
        self.on_prefill, self.on_decode = PrefillDemand(), PrefillDemand()  # by the pool that prefills

    def ended(self, num_output_tokens: int) -> None:
        self.mean_output += _OUTPUT_WEIGHT * (max(1, num_output_tokens) - self.mean_output)
