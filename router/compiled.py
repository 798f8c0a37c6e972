"""Functions that Numba compiles to machine code: loops over arrays that decide what a request costs the router.

They are compiled when their module is loaded, for the types that they are annotated with, and kept beside it or in the
user's cache, so only the first start after an installation pays for it.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar, cast, get_args, get_origin, get_type_hints

import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., object])

# Beside each type, Numba's name for it.
Word = Annotated[np.uint64, "uint64"]
Words = Annotated[npt.NDArray[np.uint64], "uint64[::1]"]
WordRows = Annotated[npt.NDArray[np.uint64], "uint64[:, ::1]"]
Counts = Annotated[npt.NDArray[np.int64], "int64[::1]"]
Floats = Annotated[npt.NDArray[np.float64], "float64[::1]"]
_NAMES = {int: "int64", float: "float64", bool: "boolean", type(None): "void"}


def compiled(function: F) -> F:
    hints = get_type_hints(function, include_extras=True)
    returned = hints.pop("return")
    signature = f"{_name(returned)}({', '.join(map(_name, hints.values()))})"
    try:
        return cast("F", numba.njit(signature, cache=True)(function))
    except RuntimeError as error:  # neither place can be written to
        if "no locator" not in str(error):
            raise
    return cast("F", numba.njit(signature)(function))


def inlined(function: F) -> F:
    """A part of compiled functions of the same file."""
    return cast("F", numba.njit(function))


def _name(annotation: object) -> str:
    if get_origin(annotation) is Annotated:
        return str(get_args(annotation)[1])
    if get_origin(annotation) is tuple:
        return f"Tuple(({', '.join(map(_name, get_args(annotation)))}))"
    return _NAMES[annotation]  # type: ignore[index]
