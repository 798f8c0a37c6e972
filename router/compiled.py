"""Functions that Numba compiles to machine code: loops over arrays that decide what a request costs the router.

They are compiled when their module is loaded, for the types that they are annotated with, and kept beside it or in the
user's cache, so only the first start after an installation pays for it. What is kept is compiled anew when its file
changes, and only then: a compiled function uses constants and functions of its own file alone.
"""

import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numba
import numpy as np
import numpy.typing as npt
from numba import types

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])

# Beside each type, Numba's.
Word = Annotated[np.uint64, types.uint64]
Words = Annotated[npt.NDArray[np.uint64], types.uint64[::1]]
WordRows = Annotated[npt.NDArray[np.uint64], types.uint64[:, ::1]]
ConstWords = Annotated[npt.NDArray[np.uint64], types.Array(types.uint64, 1, "C", readonly=True)]
Bytes = Annotated[npt.NDArray[np.uint8], types.uint8[::1]]
ByteRows = Annotated[npt.NDArray[np.uint8], types.uint8[:, ::1]]
IntRows = Annotated[npt.NDArray[np.int64], types.int64[:, ::1]]
Int32Rows = Annotated[npt.NDArray[np.int32], types.int32[:, ::1]]
Ints = Annotated[npt.NDArray[np.int64], types.int64[::1]]
Floats = Annotated[npt.NDArray[np.float64], types.float64[::1]]
FloatRows = Annotated[npt.NDArray[np.float64], types.float64[:, ::1]]
Bools = Annotated[npt.NDArray[np.bool_], types.boolean[::1]]
_TYPES = {int: types.int64, float: types.float64, type(None): types.void}


def compiled(function: F) -> F:
    hints = get_type_hints(function, include_extras=True)
    returned = _type(hints.pop("return"))
    signature = returned(*map(_type, hints.values()))
    try:
        return cast("F", numba.njit(signature, cache=True, error_model="numpy")(function))
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        log.warning("no place to keep %s, each start compiles it: %s", function.__name__, error)
    return cast("F", numba.njit(signature, error_model="numpy")(function))


def inlined(function: F) -> F:
    """A part of compiled functions of the same file."""
    return cast("F", numba.njit(function, error_model="numpy"))


def _type(annotation: object) -> Any:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[1]
    if get_origin(annotation) is tuple:
        return types.Tuple(tuple(map(_type, get_args(annotation))))  # type: ignore[no-untyped-call]
    return _TYPES[annotation]  # type: ignore[index]
