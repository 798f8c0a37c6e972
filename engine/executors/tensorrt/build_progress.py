"""How far a build is, from the phases that TensorRT reports, and a way to stop it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SMALLEST_ADVANCE = 0.005  # of the whole, that is worth a call

BuildProgress = Callable[[float], None]  # the part done, 0 to 1, never less than before


@dataclass(slots=True)
class Phase:
    parent: str | None
    num_steps: int
    num_done: int = 0


class PhaseTree:
    """Phases lie in steps of other phases; the part done is that of the outermost. Called from any thread."""

    def __init__(self, progress: BuildProgress | None) -> None:
        self._progress = progress
        self._phases: dict[str, Phase] = {}
        self._reported = 0.0
        self._lock = threading.Lock()
        self.cancelled = False

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases[name] = Phase(parent, max(1, num_steps))

    def step(self, name: str, index: int) -> bool:
        """Step `index` of the phase is done. False asks the builder to stop."""
        with self._lock:
            if (phase := self._phases.get(name)) is not None:
                phase.num_done = max(phase.num_done, index + 1)
                self._report()
        return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _report(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        part = max(self._part(name) for name in roots)
        if self._progress is not None and part >= self._reported + SMALLEST_ADVANCE:
            self._reported = part
            self._progress(part)

    def _part(self, name: str) -> float:
        phase = self._phases[name]
        inner = sum(self._part(child) for child, inside in self._phases.items() if inside.parent == name)
        return min(1.0, (phase.num_done + min(1.0, inner)) / phase.num_steps)


def make_monitor(module: Any, phases: PhaseTree) -> Any:
    """`phases` as the library's own kind of monitor."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # its base comes with the library
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
