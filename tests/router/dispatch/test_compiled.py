import numpy as np
import pytest
from numba.core.caching import CacheImpl

from router.compiled import Floats, Ints, compiled


def sums(rows: Ints, values: Floats, factor: float) -> tuple[float, int]:
    total = 0.0
    for row in rows:
        total += factor * values[row]
    return total, len(rows)


def test_a_function_is_compiled_for_the_types_it_names_before_it_is_called() -> None:
    function = compiled(sums)
    (signature,) = function.signatures  # type: ignore[attr-defined]
    assert [str(each) for each in signature] == ["array(int64, 1d, C)", "array(float64, 1d, C)", "float64"]
    assert function(np.array([2, 0]), np.array([1.0, 5.0, 3.0]), 2.0) == (8.0, 2)
    with pytest.raises(TypeError):
        function(np.array([2, 0]), np.array([1, 5, 3]), 2.0)  # other types are not compiled for in the middle of work


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(sums)(np.array([1]), np.array([1.0, 5.0]), 1.0) == (5.0, 1)
