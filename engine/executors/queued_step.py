"""A step of the torch executor on its way: queued on a GPU, then waited for; and the marks its layer groups leave."""

from collections.abc import Callable, Sequence

import torch

from engine.executors.base import Sampled, StepResult, TokenLogprobs
from engine.sampler import Choice


class GroupMarks:
    """Tells when the KV of each group of layers is in memory: at once on the CPU, on CUDA by an event to wait for."""

    def __init__(
        self, layer_groups: Sequence[int], on_group_done: Callable[[int], None] | None, device: torch.device
    ) -> None:
        self._groups = {end - 1: group for group, end in enumerate(layer_groups)}
        self._on_group_done = on_group_done
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[int, torch.cuda.Event]] = []

    @property
    def on_layer_written(self) -> Callable[[int], None] | None:
        """For what computes the layers, which calls it with each one's index."""
        return None if self._on_group_done is None else self._mark

    def wait(self) -> None:
        """Call back for each group as its event comes."""
        for group, event in self._events:
            event.synchronize()
            assert self._on_group_done is not None
            self._on_group_done(group)

    def _mark(self, layer: int) -> None:
        group = self._groups.get(layer)
        if group is None:
            return
        if self._is_cuda:
            self._events.append((group, mark()))
        elif self._on_group_done is not None:
            self._on_group_done(group)


def mark() -> torch.cuda.Event:
    """Comes when what is queued until now has run. Waiting for it sleeps rather than spins."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class QueuedStep:
    """Implements `engine.executors.base.PendingStep` on CUDA. Made when everything is queued."""

    def __init__(
        self,
        sampling: Sequence[bool],
        choice: Choice | None,
        prompt_logprobs: list[list[TokenLogprobs] | None],
        marks: GroupMarks,
    ) -> None:
        self._sampling = sampling
        self._choice = choice
        self._prompt_logprobs = prompt_logprobs
        self._marks = marks
        self._done = mark()

    def result(self) -> StepResult:
        self._marks.wait()
        self._done.synchronize()
        return step_result(self._sampling, self._choice, self._prompt_logprobs)


def step_result(
    sampling: Sequence[bool], choice: Choice | None, prompt_logprobs: list[list[TokenLogprobs] | None]
) -> StepResult:
    """`sampling`: which chunks have a token, in order."""
    found = iter(choice.read() if choice is not None else ())
    sampled: list[Sampled | None] = [next(found) if samples else None for samples in sampling]
    return StepResult(sampled, prompt_logprobs)
