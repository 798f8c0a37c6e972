"""The few calls of the CUDA driver that share memory between processes and that must be quick, by its C interface.

The first belong to no library that a worker has anyway: torch shares only whole tensors, by pickle. The C interface
is stable, and its errors leave the state of torch's runtime alone.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class CudaError(Exception):
    """A call of the driver failed, or there is no driver."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@contextmanager
def context(device_index: int) -> Iterator[None]:
    """The calls below are for this device, in this thread. It is the context that torch works in as well."""
    _call("cuCtxPushCurrent_v2", ctypes.c_void_p(_primary(device_index)))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def allocation(address: int) -> tuple[int, int]:
    """(start, size) of the allocation or mapping that an address lies in."""
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(size), ctypes.c_uint64(address))
    return start.value, size.value


def export(address: int) -> bytes:
    """The handle of the allocation that starts here: whoever has it, on this host, can open it."""
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle)


def open_mapping(handle: bytes) -> int:
    """The address here of another process's allocation. It stays mapped, however that one ends, until it is closed."""
    assert len(handle) == HANDLE_BYTES, len(handle)
    address = ctypes.c_uint64()
    _call(
        "cuIpcOpenMemHandle_v2",
        ctypes.byref(address),
        _Handle.from_buffer_copy(handle),
        ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS),
    )
    return address.value


def close_mapping(address: int) -> None:
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def upload(address: int, host_address: int, size: int, stream: int) -> None:
    """From pinned memory; does not wait. A fifth of what torch's copy costs the host."""
    _call(
        "cuMemcpyHtoDAsync_v2",
        ctypes.c_uint64(address),
        ctypes.c_void_p(host_address),
        ctypes.c_size_t(size),
        ctypes.c_void_p(stream),
    )


def _call(name: str, *args: object) -> None:
    """Releases the interpreter lock meanwhile."""
    driver = _driver()
    status = getattr(driver, name)(*args)
    if status != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()}")


@cache
def _primary(device_index: int) -> int:
    """Never released: mappings would go with it when torch has not begun to use the device."""
    device, primary = ctypes.c_int(), ctypes.c_void_p()
    _call("cuInit", ctypes.c_uint(0))
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(device_index))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), device)
    assert primary.value is not None
    return primary.value


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"no CUDA driver: {error}") from error
