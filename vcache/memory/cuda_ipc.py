"""VRAM by legacy CUDA IPC: one ``cuMemAlloc``, one handle.

It works with every driver, and ties the lives of processes together: what an importer has mapped when the exporter frees the
memory, or dies, is undefined (an access may be a fault that ends the importer's use of its GPU). The exporting process itself
cannot open its handle.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Final

from vcache.errors import CorruptionError
from vcache.memory.cuda_driver import call, driver, giving_up

HANDLE_BYTES: Final = 64
#: The driver cuts smaller allocations out of blocks of this size, and a handle shares the whole block with whatever else is in it.
BLOCK_BYTES: Final = 2 << 20


def create(stack: ExitStack, nbytes: int) -> tuple[int, bytes]:
    """Memory of the current device, in blocks of its own, and its handle. ``stack`` frees it. Raises ``CudaError``."""
    address = int(call("cuMemAlloc", -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES))
    giving_up(stack, "cuMemFree", address)
    opaque = call("cuIpcGetMemHandle", address)
    return address, ctypes.string_at(opaque.getPtr(), HANDLE_BYTES)


def open_handle(stack: ExitStack, handle: bytes) -> int:
    """Where another process's memory begins here, for the current device. ``stack`` unmaps it.

    Raises ``CudaError`` when it cannot be mapped, ``CorruptionError`` for a handle that is none.

    CUDA maps it for the context that is current and, with this flag, enables peer access as if that one had asked for it.
    """
    if len(handle) != HANDLE_BYTES:
        raise CorruptionError(f"a handle of CUDA IPC has {HANDLE_BYTES} bytes, not {len(handle)}")
    cuda = driver()
    opaque = cuda.CUipcMemHandle()
    ctypes.memmove(opaque.getPtr(), handle, HANDLE_BYTES)  # not every version of the bindings names what is in it
    address = int(call("cuIpcOpenMemHandle", opaque, cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS))
    giving_up(stack, "cuIpcCloseMemHandle", address)
    return address
