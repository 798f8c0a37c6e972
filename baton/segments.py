"""What computes the layers of a prefill worker in PyTorch's place, by the spec: TensorRT engines, or a stand-in."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cluster.spec import ClusterSpec, PoolSettings
from cluster.spec_errors import SpecError
from engine.executors.tensorrt.segment import SegmentLoader

log = logging.getLogger(__name__)

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TALKATIVE = ("onnxscript", "onnx_ir")  # a line for every node of a graph


def segment_loader(spec: ClusterSpec, pool: PoolSettings, num_threads: int) -> SegmentLoader | None:
    """None: PyTorch computes. Raises SpecError where this machine lacks what the pool's engine needs."""
    match pool.engine:
        case "onnx":
            _check_onnx("onnx")
            from engine.executors.tensorrt.loading import OnnxLoader

            return OnnxLoader(num_threads)
        case "tensorrt":
            return _tensorrt(spec, "tensorrt")
        case "auto":
            return _tensorrt(spec, "auto") if _is_possible(pool) else None
    return None


def _is_possible(pool: PoolSettings) -> bool:
    """Whether TensorRT may compute here at all; if not, one line says why."""
    reason = None
    if pool.device == "cpu":
        reason = "TensorRT needs a GPU"
    elif pool.kv_dtype == "fp8":
        reason = "engines read no KV in fp8"
    if reason is not None:
        log.warning("layers are computed in PyTorch: %s", reason)
    return reason is None


def _tensorrt(spec: ClusterSpec, engine: Literal["auto", "tensorrt"]) -> SegmentLoader | None:
    import torch

    from engine.executors.tensorrt.engine_cache import EngineCache, default_directory
    from engine.executors.tensorrt.library import LibraryMissing, gpu_capability, load_library

    try:
        library = load_library(engine, gpu_capability())
    except LibraryMissing as error:
        raise SpecError([f"prefill.engine: 'tensorrt' is not possible here: {error}"]) from error
    if library is None:
        return None
    _check_onnx(engine)
    from engine.executors.tensorrt.loading import TensorRTLoader, or_pytorch

    directory = spec.tensorrt.cache_dir
    cache = EngineCache(default_directory() if directory is None else Path(directory).expanduser())
    log.info("layers are computed by %s; its engines are in %s", library.title, cache.directory)
    loader = TensorRTLoader(library, cache, torch.device("cuda:0"), _ProgressLog())
    return or_pytorch(loader) if engine == "auto" else loader


def _check_onnx(engine: str) -> None:
    if missing := [package for package in ONNX_PACKAGES if find_spec(package) is None]:
        raise SpecError(
            [f"prefill.engine: {engine!r} needs {' and '.join(missing)}; install: pip install {' '.join(missing)}"]
        )
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


class _ProgressLog:
    """A line for every tenth of the work, and for every kind of it."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, what: str, part: float) -> None:
        if (what, int(10 * part)) != self._last:
            self._last = (what, int(10 * part))
            log.info("engines: %.0f %%, %s", 100 * part, what)
