import ast
import inspect
import math
from types import ModuleType

import numpy as np
import pytest
from numba.core.caching import CacheImpl
from numba.core.dispatcher import Dispatcher

from router import block_table, costs
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


@pytest.mark.parametrize("module", [block_table, costs])
def test_a_compiled_function_uses_what_is_in_its_own_file(module: ModuleType) -> None:
    """Else what was compiled before would be taken from the cache when the other file has changed."""
    here = {
        name.id if isinstance(name, ast.Name) else name.name
        for statement in ast.parse(inspect.getsource(module)).body
        for name in ast.walk(statement)
        if isinstance(name, ast.FunctionDef | ast.ClassDef)
        or (isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
    }
    functions = [each for each in vars(module).values() if isinstance(each, Dispatcher)]
    assert len(functions) > 5
    for function in functions:
        code = function.py_func.__code__
        used = {name for name in code.co_names if name in vars(module) and vars(module)[name] not in (np, math)}
        assert used <= here, function
