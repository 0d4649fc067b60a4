"""VRAM shared between processes: one allocation of its own, one segment.

Never from a caching allocator: a handle covers the whole allocation, and expandable segments cannot be exported. Devices are
named by UUID, since ordinals differ between processes. Two kinds of handles do it: by file descriptor (``cuda_vmm``), preferred
because its memory survives the exporter, and CUDA IPC (``cuda_ipc``), which the exporting process cannot open: it uses its own
pointer (``mappings.Mappings.adopt``). No torch, unless somebody asks for the tensor: a donor of its own holds the segment and a
bare context.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Literal

from vcache.errors import CapacityError, CorruptionError, UnavailableError
from vcache.memory import cuda_ipc, cuda_vmm
from vcache.memory.base import IPC
from vcache.memory.cuda_driver import CudaError, call, can_read, device_ordinal, device_uuid, on_device, zero
from vcache.memory.cuda_words import CudaWords
from vcache.memory.foreign_tensor import tensor_over
from vcache.pool.runtime_dir import RuntimeDir
from vcache.units import approximate_size, format_size

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

HandleKind = Literal["auto", "vmm", "ipc"]

_ALIGNMENT: Final = 4096
#: What a handle begins with.
_VMM: Final = b"vmm "


class CudaMemory:
    """VRAM. ``create`` makes and owns it, ``open`` maps another process's.

    ``device``: the UUID of the GPU that has it. ``ordinal``: the device of this process that may read and write it, which for
    memory of a peer is another one.
    """

    def __init__(
        self, address: int, nbytes: int, *, device: str, ordinal: int, handle: bytes, release: ExitStack
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self.device = device
        self.ordinal = ordinal
        self.handle = handle
        self.words = CudaWords(address, ordinal)
        self._release = release
        self._lock = threading.Lock()
        self._closed = False
        self._tensor: torch.Tensor | None = None

    @classmethod
    def create(
        cls, runtime: RuntimeDir, segment_id: bytes, nbytes: int, *, device: str, handles: HandleKind = "auto"
    ) -> CudaMemory:
        """Allocates zeroed VRAM on ``device`` ("cuda:0", or a UUID). The caller owns it and must ``close`` it.

        ``handles``: "vmm" or "ipc" for that kind only, "auto" for the first that can be had. Raises ``CapacityError`` naming both
        numbers when there is less memory, ``UnavailableError`` when device or kind are not there.
        """
        if nbytes <= 0 or nbytes % _ALIGNMENT:
            raise ValueError(f"nbytes = {nbytes}: must be a positive multiple of {_ALIGNMENT}")
        ordinal = device_ordinal(device)
        with on_device(ordinal):
            free = _free_bytes()
            if nbytes > free:
                raise _too_little(nbytes, free, device)
            if handles != "ipc":
                try:
                    return cls._create(runtime, segment_id, nbytes, ordinal, _VMM)
                except (UnavailableError, OSError) as error:
                    if handles == "vmm":
                        raise UnavailableError(f"segment.cuda_handles = 'vmm': {error}; use auto or ipc") from error
                    logger.warning("the segment on %s is shared by CUDA IPC instead of VMM handles: %s", device, error)
            return cls._create(runtime, segment_id, nbytes, ordinal, IPC)

    @classmethod
    def _create(cls, runtime: RuntimeDir, segment_id: bytes, nbytes: int, ordinal: int, kind: bytes) -> CudaMemory:
        """By one kind of handle, on the current device ``ordinal``. What was made is taken back when a step fails."""
        device = device_uuid(ordinal)
        with ExitStack() as stack:
            try:
                if kind == _VMM:
                    address, handle = cuda_vmm.create(stack, runtime, segment_id, nbytes, ordinal=ordinal)
                else:
                    address, handle = cuda_ipc.create(stack, nbytes)
                zero(address, nbytes)
            except CudaError as error:
                if error.is_out_of_memory:
                    raise _too_little(nbytes, _free_bytes(), device) from error
                raise
            release = stack.pop_all()
        return cls(address, nbytes, device=device, ordinal=ordinal, handle=kind + handle, release=release)

    @classmethod
    def open(
        cls, runtime: RuntimeDir, handle: bytes, nbytes: int, *, device: str, reader: str | None = None
    ) -> CudaMemory:
        """Maps what another process of this host made on ``device`` (a UUID), for use by ``reader`` (default: the same device).

        Nothing is ever done on ``device`` itself when ``reader`` is another. Raises ``UnavailableError`` when this process cannot
        see the devices, ``reader`` has no access to the other's memory, or the handle cannot be opened; ``CorruptionError`` for a
        handle that is none.
        """
        owner = device_ordinal(device)
        ordinal = owner if reader is None else device_ordinal(reader)
        if not can_read(ordinal, owner):
            raise UnavailableError(
                f"device {reader} has no peer access to memory of {device}: `vcache doctor` lists the pairs"
            )
        kind, opaque = handle[: len(_VMM)], handle[len(_VMM) :]
        with on_device(ordinal), ExitStack() as stack:
            try:
                if kind == _VMM:
                    address = cuda_vmm.open_handle(stack, runtime, opaque, nbytes, reader=ordinal)
                elif kind == IPC:
                    address = cuda_ipc.open_handle(stack, opaque)
                else:
                    raise CorruptionError(f"{kind!r} is no kind of handle")
            except CudaError as error:
                raise UnavailableError(
                    f"the segment on {device} cannot be opened ({kind.decode().strip()}): {error}"
                ) from error
            return cls(address, nbytes, device=device, ordinal=ordinal, handle=handle, release=stack.pop_all())

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 ``[nbytes]`` on the device ``ordinal``; not to be used after ``close``, which unmaps it whoever holds it."""
        tensor = self._tensor
        if tensor is not None:
            return tensor
        with self._lock:
            if self._closed:
                raise UnavailableError("the segment's memory was closed")
            if self._tensor is None:
                self._tensor = tensor_over(self.address, self.nbytes, cuda_ordinal=self.ordinal)
            return self._tensor

    def close(self) -> None:
        """Only once every user's work on it has completed: this does not wait for the device.

        To wait for a whole device would spoil a capture of a graph that another thread is at, and unmapping by itself does not
        wait in every case. Harmless when called twice.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tensor = None
        try:
            with on_device(self.ordinal):
                self._release.close()
        except CudaError as error:  # the context is beyond use, and all of its memory with it
            logger.warning("the segment's memory on %s cannot be given up: %s", self.device, error)


def _free_bytes() -> int:
    """Of the current device."""
    return int(call("cuMemGetInfo"))


def _too_little(nbytes: int, free: int, device: str) -> CapacityError:
    return CapacityError(
        f"a segment of {format_size(nbytes)} was asked for on {device}, {approximate_size(free)} are free there; use a smaller segment.size, or, "
        "where a serving engine shares the device, donate before it starts or lower its gpu_memory_utilization"
    )
