"""VRAM by CUDA's virtual memory management, its handle passed by file descriptor.

Here memory and addresses are things of their own. CUDA frees the memory "when all outstanding mappings to the memory are unmapped
and when all outstanding references to the handle (including its shareable counterparts) are also released" (cuMemRelease): so an
importer's mapping is good for as long as the importer wants, whatever becomes of the exporter. A descriptor reaches importers over a
socket in the runtime directory, not through an IPC namespace.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from vcache.errors import CorruptionError, UnavailableError
from vcache.memory.cuda_driver import attribute, call, driver, giving_up, quietly
from vcache.memory.descriptors import DescriptorServer, receive_descriptor
from vcache.pool.runtime_dir import RuntimeDir

#: An exporter answers within microseconds unless its interpreter is held up; a reader must not be.
PATIENCE_S: Final = 1.0
#: How long one that did not answer is not asked again.
SILENCE_S: Final = 5.0

_silent: Final[dict[Path, float]] = {}


def why_not(ordinal: int) -> str:
    """What a device lacks for it; empty if nothing."""
    needed = {
        "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": "virtual memory management",
        "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": "handles by file descriptor",
    }
    missing = [text for name, text in needed.items() if not attribute(ordinal, name)]
    return f"driver or device have no {' and no '.join(missing)}" if missing else ""


def create(stack: ExitStack, runtime: RuntimeDir, segment_id: bytes, nbytes: int, *, ordinal: int) -> tuple[int, bytes]:
    """Memory of the current device ``ordinal`` and its handle, which names the socket. ``stack`` takes it all back.

    Raises ``UnavailableError`` (``CudaError`` among it) or ``OSError``, also where nobody could open it.
    """
    if reason := why_not(ordinal):
        raise UnavailableError(reason)
    kind = driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    wanted = _properties(ordinal)
    least = driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    granularity = int(call("cuMemGetAllocationGranularity", wanted, least))
    whole = -(-nbytes // granularity) * granularity
    memory = call("cuMemCreate", whole, wanted, 0)
    giving_up(stack, "cuMemRelease", memory)
    address = _map(stack, memory, whole, reader=ordinal)
    fd = int(call("cuMemExportToShareableHandle", memory, kind, 0))
    try:
        os.set_inheritable(fd, False)  # a child would keep the memory
        quietly(
            "cuMemRelease", call("cuMemImportFromShareableHandle", fd, kind)
        )  # some sandboxes refuse: better now than later
        server = DescriptorServer(runtime, segment_id, fd)
    except BaseException:
        os.close(fd)
        raise
    stack.callback(server.close)
    return address, f"{whole} {server.path.name}".encode()


def open_handle(stack: ExitStack, runtime: RuntimeDir, handle: bytes, nbytes: int, *, reader: int) -> int:
    """Where another process's memory begins here, for the current device ``reader``. ``stack`` unmaps it.

    Raises ``UnavailableError`` when it cannot be had or mapped, ``CorruptionError`` for a handle that is none.
    """
    size, _, name = handle.decode("ascii", errors="replace").partition(" ")
    if not size.isdecimal() or int(size) < nbytes:
        raise CorruptionError(f"the handle {handle!r} is not one of {nbytes} bytes")
    path = runtime.segment_socket(name)
    fd = _received(path)
    try:
        kind = driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        memory = call("cuMemImportFromShareableHandle", fd, kind)
    finally:
        os.close(fd)
    try:
        return _map(stack, memory, int(size), reader=reader)
    finally:
        quietly("cuMemRelease", memory)  # the mapping keeps it


def _received(path: Path) -> int:
    """The descriptor that is handed out at ``path``. A reader waits once for a process that does not answer, and then not for a while."""
    if time.monotonic() < _silent.get(path, 0.0):
        raise UnavailableError(f"{path}: no answer a moment ago")
    try:
        return receive_descriptor(path, PATIENCE_S)
    except TimeoutError:
        _silent[path] = time.monotonic() + SILENCE_S
        raise UnavailableError(f"{path}: no answer in {PATIENCE_S:g} s; its process is stopped or busy") from None


def _properties(ordinal: int) -> Any:
    cuda = driver()
    wanted = cuda.CUmemAllocationProp()
    wanted.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = ordinal
    wanted.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    # A network card may read such memory only if that was asked for, unlike memory of cuMemAlloc.
    wanted.allocFlags.gpuDirectRDMACapable = attribute(ordinal, "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")
    return wanted


def _map(stack: ExitStack, memory: Any, nbytes: int, *, reader: int) -> int:
    """Addresses for ``memory``, which the device ``reader`` may use; without access CUDA lets no device at them."""
    cuda = driver()
    address = int(call("cuMemAddressReserve", nbytes, 0, 0, 0))
    giving_up(stack, "cuMemAddressFree", address, nbytes)
    call("cuMemMap", address, nbytes, 0, memory, 0)
    giving_up(stack, "cuMemUnmap", address, nbytes)
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = reader
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call("cuMemSetAccess", address, nbytes, [access], 1)
    return address
