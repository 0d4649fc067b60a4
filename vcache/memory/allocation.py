"""Takes the memory of a new segment from the device that the configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcache.memory.base import is_host
from vcache.memory.host import HostMemory

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.memory.base import Memory
    from vcache.pool.runtime_dir import RuntimeDir


def allocate(config: VCacheConfig, runtime: RuntimeDir, segment_id: bytes, nbytes: int, *, device: str) -> Memory:
    """Zeroed memory of ``device`` ("cuda:0", "cpu:1"), owned by the caller; torch is loaded for a GPU's only.

    ``segment.tier`` "dram" takes host memory for a GPU too; "vram" on a CPU is host memory that stands in for a GPU's.
    Raises ``CapacityError`` when the device has not as much memory.
    """
    if device.startswith("cuda") and config.segment.tier != "dram":
        from vcache.memory.cuda import CudaMemory  # needs CuPy

        return CudaMemory.create(nbytes, device=device)
    name = device if is_host(device) else "cpu:0"
    return HostMemory.create(runtime, segment_id, nbytes, device=name)
