"""TensorRT or TensorRT for RTX, whichever is installed, behind one description of what they do differently.

Both have the same classes. What differs: the module's name; TensorRT compiles for the GPU it finds and times kernels on
it, so it keeps a timing cache; TensorRT-RTX compiles ahead of time for a list of GPUs, with no GPU at hand, and times
nothing; it refuses others, Hopper's 9.0 among them. A build of a refittable engine needs a GPU with either.
"""

import importlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")  # the last is what the second's wheels hold
FIRST_CAPABILITY = (7, 5)  # of TensorRT 10.5 and later
MAX_ERRORS = 32
# Said once more, by a helper of the library, after an error that says what was being done.
ECHO = "checkMacros.cpp::catchCudaError"

logger = logging.getLogger(__name__)


class Capability(NamedTuple):
    """A GPU's compute capability, such as 8.9."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def parse(cls, text: str) -> "Capability":
        major, dot, minor = text.partition(".")
        if not (dot and major.isdecimal() and len(minor) == 1 and minor.isdecimal()):
            raise ValueError(f"a compute capability is two numbers such as 8.9, not {text!r:.40}")
        return cls(int(major), int(minor))


class LibraryMissing(ValueError):
    """No TensorRT here for the GPU at hand. The message says what to install."""


class Messages:
    """What the library reported. Errors are kept for whoever raises; the rest goes to the log."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=MAX_ERRORS)

    def add(self, severity: int, text: str) -> None:
        """`severity` as in ILogger: 0 and 1 are errors, 2 warnings. May be called from any thread."""
        if severity <= 1:
            self._errors.append(text.strip())
        if severity <= 3:
            logger.log(logging.INFO if severity == 2 else logging.DEBUG, "%s", text.strip())

    @property
    def has_errors(self) -> bool:
        """Whether there are any since `collected` was last entered."""
        return bool(self._errors)

    @contextmanager
    def collected(self) -> Iterator[Callable[[], str]]:
        """Yields the function that gives the errors since, the last ones, in one line."""
        self._errors.clear()

        def said() -> str:
            errors = list(dict.fromkeys(self._errors))
            causes = [error for error in errors if ECHO not in error] or errors
            return "; ".join(causes[-3:]) or "it gave no reason"

        yield said


@dataclass(frozen=True, slots=True)
class Library:
    """An imported library. One thread builds with it at a time, for its errors are collected in one place.

    The library keeps the first logger it is given in a process for as long as anything made with it lives.
    """

    module: Any
    messages: Messages = field(default_factory=Messages, compare=False)
    log: Any = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", make_logger(self.module, self.messages))

    @property
    def name(self) -> Literal["tensorrt", "tensorrt_rtx"]:
        return "tensorrt" if self.module.__name__ == "tensorrt" else "tensorrt_rtx"

    @property
    def title(self) -> str:
        return f"{'TensorRT' if self.name == 'tensorrt' else 'TensorRT-RTX'} {self.version}"

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def builds_ahead(self) -> bool:
        """For GPUs that are not there."""
        return self.name == "tensorrt_rtx"

    @property
    def keeps_timings(self) -> bool:
        return self.name == "tensorrt"

    @property
    def targets(self) -> tuple[Capability, ...]:
        """What TensorRT-RTX compiles for and runs on, ascending."""
        names = self.module.ComputeCapability.__members__ if self.builds_ahead else ()
        return tuple(sorted(Capability(int(name[2:-1]), int(name[-1])) for name in names if name.startswith("SM")))

    def target(self, capability: Capability) -> Any:
        """The library's own name for one of `targets`."""
        return self.module.ComputeCapability.__members__[f"SM{capability.major}{capability.minor}"]

    def why_unsupported(self, capability: Capability) -> str | None:
        """What keeps this library from GPUs of `capability`, or None."""
        if self.builds_ahead:
            names = ", ".join(map(str, self.targets))
            return None if capability in self.targets else f"{self.title} is for GPUs of {names}, not {capability}"
        if capability < FIRST_CAPABILITY:
            return f"{self.title} is for GPUs from {Capability(*FIRST_CAPABILITY)} on, not {capability}"
        return None

    def builder(self) -> Any:
        return self.module.Builder(self.log)

    def runtime(self) -> Any:
        return self.module.Runtime(self.log)


def make_logger(module: Any, messages: Messages) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]  # its base comes with the library
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.add(int(severity), text)

    return Logger()


@overload
def load_library(
    engine: Literal["tensorrt"],
    capability: Capability | None = ...,
    importer: Callable[[str], ModuleType] = ...,
    *,
    ahead: bool = ...,
) -> Library: ...


@overload
def load_library(
    engine: Literal["auto", "tensorrt"],
    capability: Capability | None = ...,
    importer: Callable[[str], ModuleType] = ...,
    *,
    ahead: bool = ...,
) -> Library | None: ...


def load_library(
    engine: Literal["auto", "tensorrt"],
    capability: Capability | None = None,
    importer: Callable[[str], ModuleType] = importlib.import_module,
    *,
    ahead: bool = False,
) -> Library | None:
    """The first library that can serve GPUs of `capability` (None: any it can), TensorRT before TensorRT-RTX. `ahead`:
    it need not run, but compile for a GPU that is not there.

    Where there is none, "tensorrt" raises LibraryMissing; "auto" logs one warning that says why and gives None, for the
    caller to compute in PyTorch.
    """
    reasons: list[str] = []
    can_build_ahead = False
    for name in MODULES:
        try:
            module = importer(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # its shared libraries are missing or do not fit
            reasons.append(f"{name} cannot be loaded: {error}")
            continue
        if not hasattr(module, "Builder"):
            continue
        library = Library(module)
        reason = None if capability is None else library.why_unsupported(capability)
        can_build_ahead |= library.builds_ahead
        if ahead and not library.builds_ahead:
            reason = f"{library.title} compiles only for the GPU that it finds"
        if reason is None:
            return library
        reasons.append(reason)
    problem = "; ".join(reasons) or "neither TensorRT nor TensorRT-RTX is installed"
    if engine == "auto":
        logger.warning("layers are computed in PyTorch: %s", problem)
        return None
    if ahead and can_build_ahead:
        raise LibraryMissing(f"{problem}; TensorRT compiles on such a GPU itself, there: {install_line(capability)}")
    raise LibraryMissing(f"{problem}; install it: {install_line(None if ahead else capability)}")


def install_line(capability: Capability | None) -> str:
    """The command for GPUs of `capability`; None: to compile where there is no GPU, which only TensorRT-RTX does."""
    cuda = f"cu{(torch.version.cuda or '13').partition('.')[0]}"
    if capability is None:
        return f"pip install tensorrt-rtx-{cuda}-libs tensorrt-rtx-{cuda}-bindings"
    return f"pip install tensorrt-{cuda}"


def gpu_capability() -> Capability | None:
    """Of the process's first GPU; None without one."""
    return Capability(*torch.cuda.get_device_capability(0)) if torch.cuda.is_available() else None
