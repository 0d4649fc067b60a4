"""Host memory pinned for this process's GPUs: copies to and from it go at the speed of the bus, not through the driver's buffers.

Pinning is a process's own affair: each that has mapped a segment pins its mapping. It makes every page present.
"""

from __future__ import annotations

import logging
from typing import Final

from vcache.errors import UnavailableError
from vcache.memory.cuda_driver import call, device_ordinal, on_device, quietly
from vcache.memory.host import HostMemory

logger = logging.getLogger(__name__)

#: CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process, not for that of one device.
_PORTABLE: Final = 1


class Pinning:
    """``pin`` makes it; ``end`` it before the memory is closed, once every copy from or to the memory has happened."""

    def __init__(self, address: int, ordinal: int) -> None:
        self._address = address
        self._ordinal = ordinal

    def end(self) -> None:
        """Harmless when called twice."""
        address, self._address = self._address, 0
        if address:
            try:
                with on_device(self._ordinal):
                    quietly("cuMemHostUnregister", address)
            except UnavailableError as error:  # the context is beyond use, and pins nothing any more
                logger.warning("host memory cannot be unpinned: %s", error)


def pin(memory: HostMemory, *, device: str) -> Pinning:
    """Pins all of ``memory``; ``device``: a GPU that this process uses ("cuda:0", or a UUID). Takes a while, and waits for no GPU.

    ``memory`` must stay open meanwhile. Raises ``UnavailableError`` where the system does not allow it: copies work without, but
    CUDA waits in them for the device.
    """
    ordinal = device_ordinal(device)
    with on_device(ordinal):
        call("cuMemHostRegister", memory.address, memory.nbytes, _PORTABLE)
    return Pinning(memory.address, ordinal)
