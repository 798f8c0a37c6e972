import math
import resource

import pytest

from baton.descriptors import MANY, allow_descriptors

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(1024, 4096, 4096), (1024, UNLIMITED, MANY), (2 * MANY, UNLIMITED, 2 * MANY), (4096, 4096, 4096)],
)
def test_the_limit_on_descriptors_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int
) -> None:
    changes = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: changes.append(limits))
    assert allow_descriptors() == raised
    assert changes == [(raised, hard)]


def test_a_limit_on_descriptors_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_kind: int, _limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, UNLIMITED))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert allow_descriptors() == 1024
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (UNLIMITED, UNLIMITED))
    assert allow_descriptors() == math.inf
