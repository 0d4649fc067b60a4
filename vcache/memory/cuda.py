"""VRAM shared between processes: one cudaMalloc, one CUDA IPC handle, one segment.

Never from a caching allocator: a handle covers the whole allocation, and expandable segments cannot be exported. Devices are
named by UUID, since ordinals differ between processes. The process that exports a handle cannot open it: it uses its own
pointer (``mappings.Mappings.adopt``). Needs CuPy; importable and type-checked without it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vcache.errors import CapacityError, UnavailableError
from vcache.memory.base import WORD_BYTES, IndexArray, WordArray

if TYPE_CHECKING:
    import torch

_ALIGNMENT: Final = 4096
_PEER_ACCESS_LAZY: Final = 1
_HOST_TO_DEVICE: Final = 1


class CudaWords:
    """Words of VRAM, by small copies on the calling thread's current stream, in the order of whatever it enqueued there.

    A stand-alone donor needs no kernels for this. Loads wait for the stream.
    """

    def __init__(self, address: int, tensor: torch.Tensor) -> None:
        import torch

        self._address = address
        self._tensor = tensor.view(torch.int64)
        self._runtime = _cuda_runtime()

    def load(self, index: int) -> int:
        return int(self.load_run(index, 1)[0])

    def store(self, index: int, value: int) -> None:
        self._copy_in(index, np.array([value], dtype=np.uint64))

    def store_run(self, start: int, values: WordArray) -> None:
        self._copy_in(start, np.ascontiguousarray(values))

    def load_each(self, indices: IndexArray) -> WordArray:
        import torch

        at = torch.from_numpy(indices.reshape(-1)).to(self._tensor.device, non_blocking=False)
        found: WordArray = self._tensor[at].cpu().numpy().view(np.uint64).reshape(indices.shape)
        return found

    def load_run(self, start: int, count: int) -> WordArray:
        found: WordArray = self._tensor[start : start + count].cpu().numpy().view(np.uint64)
        return found

    def fence(self) -> None:
        import torch

        torch.cuda.current_stream(self._tensor.device).synchronize()

    def _copy_in(self, start: int, values: WordArray) -> None:
        import torch

        # The driver takes so small a piece of pageable memory before it returns; each word of it arrives whole.
        stream = torch.cuda.current_stream(self._tensor.device)
        self._runtime.memcpyAsync(
            self._address + start * WORD_BYTES, values.ctypes.data, values.nbytes, _HOST_TO_DEVICE, stream.cuda_stream
        )


class _Array:
    """What torch needs to see memory of others as a tensor."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaMemory:
    """VRAM. ``create`` makes and owns it, ``open`` maps another process's."""

    def __init__(self, address: int, nbytes: int, *, ordinal: int, handle: bytes, is_owned: bool) -> None:
        import torch

        self.address = address
        self.nbytes = nbytes
        self.handle = handle
        self.ordinal = ordinal
        self.device = device_uuid(ordinal)
        self._is_owned = is_owned
        self._lock = threading.Lock()
        self._closed = False
        self._tensor: torch.Tensor = torch.as_tensor(_Array(address, nbytes), device=f"cuda:{ordinal}")
        self.words = CudaWords(address, self._tensor)

    @classmethod
    def create(cls, nbytes: int, *, device: str) -> CudaMemory:
        """Allocates zeroed VRAM on ``device`` ("cuda:0", or a UUID). The caller owns it and must ``close`` it.

        Raises ``CapacityError`` naming both numbers when there is less, ``UnavailableError`` when the device is not there.
        """
        if nbytes <= 0 or nbytes % _ALIGNMENT:
            raise ValueError(f"nbytes = {nbytes}: must be a positive multiple of {_ALIGNMENT}")
        runtime = _cuda_runtime()
        ordinal = device_ordinal(device)
        with _on_device(ordinal):
            free, _ = runtime.memGetInfo()
            if nbytes > free:
                raise _too_little(nbytes, free, device)
            try:
                address = runtime.malloc(nbytes)
            except runtime.CUDARuntimeError as error:
                raise _too_little(nbytes, runtime.memGetInfo()[0], device) from error
            try:
                runtime.memset(address, 0, nbytes)
                runtime.deviceSynchronize()
                handle = bytes(runtime.ipcGetMemHandle(address))
                return cls(address, nbytes, ordinal=ordinal, handle=handle, is_owned=True)
            except BaseException:
                runtime.free(address)
                raise

    @classmethod
    def open(cls, handle: bytes, nbytes: int, *, device: str) -> CudaMemory:
        """Maps what another process of this host made on ``device`` (a UUID).

        Raises ``UnavailableError`` when this process cannot see the device, or the handle cannot be opened.
        """
        runtime = _cuda_runtime()
        ordinal = device_ordinal(device)
        with _on_device(ordinal):
            try:
                address = runtime.ipcOpenMemHandle(handle, _PEER_ACCESS_LAZY)
            except runtime.CUDARuntimeError as error:
                raise UnavailableError(f"the segment on {device} cannot be opened through CUDA IPC: {error}") from error
        return cls(address, nbytes, ordinal=ordinal, handle=handle, is_owned=False)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 ``[nbytes]``; not to be used after ``close``, which unmaps it whoever holds it."""
        if self._closed:
            raise UnavailableError("the segment's memory was closed")
        return self._tensor

    def close(self) -> None:
        """After every user's work on it has completed: this waits for the device."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        runtime = _cuda_runtime()
        with _on_device(self.ordinal):
            runtime.deviceSynchronize()
            if self._is_owned:
                runtime.free(self.address)
            else:
                runtime.ipcCloseMemHandle(self.address)


def device_uuid(ordinal: int) -> str:
    """The UUID of the device that this process calls ``cuda:<ordinal>``, as ``vcache.devices`` names it."""
    import torch

    return str(torch.cuda.get_device_properties(ordinal).uuid)


def device_ordinal(device: str) -> int:
    """What this process calls ``device`` ("cuda:0", or a UUID). Raises ``UnavailableError`` when it cannot see it."""
    import torch

    visible = torch.cuda.device_count()
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


def _cuda_runtime() -> Any:
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise UnavailableError(
            f"VRAM segments need CuPy ({error}); install vcache[cuda12] or vcache[cuda13], as the driver has it"
        ) from error
    return runtime


def _on_device(ordinal: int) -> Any:
    import torch

    return torch.cuda.device(ordinal)


def _too_little(nbytes: int, free: int, device: str) -> CapacityError:
    return CapacityError(
        f"a segment of {nbytes} bytes was asked for on {device}, {free} bytes are free there; use a smaller segment.size, or, "
        "where a serving engine shares the device, donate before it starts or lower its gpu_memory_utilization"
    )
