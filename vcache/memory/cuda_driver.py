"""The CUDA driver, as far as memory needs it: devices by UUID, errors by name, calls that no capture of a graph suffers from.

Through cuda-bindings, by the driver's own interface alone: handles by file descriptor have no other, and what it allocates is the
same memory that torch sees. A context is made only where ``on_device`` is used (it takes about 0.5 GB). Importable and type-checked
without package or driver.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

from vcache.errors import UnavailableError

logger = logging.getLogger(__name__)

_contexts: dict[int, Any] = {}
_contexts_lock: Final = threading.Lock()


class CudaError(UnavailableError):
    """The driver refused a call. ``is_out_of_memory``: because the device has not enough."""

    def __init__(self, call: str, status: Any) -> None:
        cuda = driver()
        _, said = cuda.cuGetErrorString(status)
        super().__init__(f"{call}: {status.name} ({said.decode() if said else 'no text'})")
        self.is_out_of_memory = status == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY


@functools.cache
def driver() -> Any:
    """The bindings, initialised. Raises ``UnavailableError`` without them, without a driver, or without a GPU."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError as error:
        raise UnavailableError(
            f"VRAM segments need cuda-bindings ({error}); pip install '.[cuda12]' or '.[cuda13]', as the driver has it"
        ) from error
    try:
        (status,) = cuda.cuInit(0)
    except RuntimeError as error:  # there is no libcuda
        raise UnavailableError(f"no NVIDIA driver: {error}") from error
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise UnavailableError(f"the NVIDIA driver cannot be used: cuInit: {status.name}; `vcache doctor` says more")
    return cuda


def call(name: str, *arguments: Any) -> Any:
    """What a function of the driver answers, without its status. Raises ``CudaError``."""
    cuda = driver()
    try:
        status, *answer = getattr(cuda, name)(*arguments)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # a driver older than the function, one newer than the bindings' statuses
        raise UnavailableError(f"{name}: {error}") from error
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise CudaError(name, status)
    return answer[0] if answer else None


def quietly(name: str, *arguments: Any) -> None:
    """``call`` to give something up: what fails is logged, since the rest has to be given up all the same."""
    try:
        call(name, *arguments)
    except UnavailableError as error:
        logger.warning("%s", error)


def device_count() -> int:
    """The GPUs that this process sees. Raises ``UnavailableError`` as ``driver`` does."""
    return int(call("cuDeviceGetCount"))


def device_uuid(ordinal: int) -> str:
    """The UUID of the device that this process calls ``cuda:<ordinal>``, as ``vcache.devices`` names it."""
    return str(uuid.UUID(bytes=bytes(call("cuDeviceGetUuid", _device(ordinal)).bytes)))


def device_ordinal(device: str) -> int:
    """What this process calls ``device`` ("cuda:0", or a UUID). Raises ``UnavailableError`` when it cannot see it."""
    try:
        visible = device_count()
    except UnavailableError as error:
        raise UnavailableError(f"device {device!r}: {error}") from error
    if device.startswith("cuda"):
        ordinal = int(device.partition(":")[2] or 0)
        if ordinal < visible:
            return ordinal
    for ordinal in range(visible):
        if device_uuid(ordinal) == device:
            return ordinal
    raise UnavailableError(
        f"device {device!r}: this process sees {visible} GPUs and it is none of them; check CUDA_VISIBLE_DEVICES"
    )


def attribute(ordinal: int, name: str) -> int:
    """``CU_DEVICE_ATTRIBUTE_<name>``; 0 where the bindings do not know it yet."""
    known = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
    return int(call("cuDeviceGetAttribute", known, _device(ordinal))) if known is not None else 0


def can_read(reader: int, owner: int) -> bool:
    """Whether kernels on the device ``reader`` may read and write memory of ``owner``."""
    return reader == owner or bool(call("cuDeviceCanAccessPeer", _device(reader), _device(owner)))


@contextlib.contextmanager
def on_device(ordinal: int) -> Iterator[None]:
    """Makes the device's primary context, which torch uses too, current for calls within; and makes them harmless to captures.

    While a thread captures a graph in global mode, as serving engines do, allocations and synchronous copies of *any* thread
    fail and spoil the capture, unless that thread is in relaxed mode. Even then nobody may wait for a stream that is captured,
    nor for the whole device: nothing here does.
    """
    cuda = driver()
    call("cuCtxPushCurrent", _context(ordinal))
    try:
        before = call("cuThreadExchangeStreamCaptureMode", cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            call("cuThreadExchangeStreamCaptureMode", before)
    finally:
        call("cuCtxPopCurrent")


def zero(address: int, nbytes: int) -> None:
    """Fills memory of the current device with zeros; done on return. On a stream of its own, which waits for no other."""
    stream = call("cuStreamCreate", driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
    try:
        call("cuMemsetD8Async", address, 0, nbytes, stream)
        call("cuStreamSynchronize", stream)
    finally:
        quietly("cuStreamDestroy", stream)


def giving_up(stack: contextlib.ExitStack, name: str, *arguments: Any) -> None:
    """Has ``stack`` make that call when it is closed, before those of what was registered earlier."""
    give_up: Callable[..., None] = quietly
    stack.callback(give_up, name, *arguments)


def _device(ordinal: int) -> Any:
    return call("cuDeviceGet", ordinal)


def _context(ordinal: int) -> Any:
    """The primary context of a device; retained for as long as the process lives."""
    with _contexts_lock:
        if ordinal not in _contexts:
            _contexts[ordinal] = call("cuDevicePrimaryCtxRetain", _device(ordinal))
        return _contexts[ordinal]
