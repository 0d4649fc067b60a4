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
    """Zeroed memory of ``device`` ("cuda:0", "cpu:1"), owned by the caller. Nothing here loads torch.

    ``segment.tier`` "dram" takes host memory for a GPU too; "vram" on a CPU is host memory that stands in for a GPU's.
    Raises ``CapacityError`` when the device has not as much memory, ``UnavailableError`` when a GPU's cannot be had or shared.
    """
    if device.startswith("cuda") and config.segment.tier != "dram":
        from vcache.memory.cuda import CudaMemory

        return CudaMemory.create(runtime, segment_id, nbytes, device=device, handles=config.segment.cuda_handles)
    name = device if is_host(device) else "cpu:0"
    return HostMemory.create(runtime, segment_id, nbytes, device=name)
