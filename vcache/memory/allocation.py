"""Takes the memory of a new segment from a device, in the tier that the configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcache.errors import ConfigError
from vcache.memory.host import HostMemory

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.memory.base import Memory
    from vcache.pool.runtime_dir import RuntimeDir


def allocate(config: VCacheConfig, runtime: RuntimeDir, segment_id: bytes, nbytes: int, *, device: str) -> Memory:
    """Zeroed memory of ``device`` ("cuda:0", "cpu:1"), owned by the caller; torch is loaded for a GPU's only.

    ``segment.tier`` "dram" takes host memory for a GPU too. Raises ``ConfigError`` when the device has no such tier,
    ``CapacityError`` when it has not as much memory.
    """
    tier = config.segment.tier
    is_gpu = device.startswith("cuda")
    if tier == "vram" and not is_gpu:
        raise ConfigError(
            f"segment.tier = 'vram' (from {config.origin('segment.tier')}): {device} has none; use dram or auto"
        )
    if is_gpu and tier != "dram":
        from vcache.memory.cuda import CudaMemory  # needs CuPy

        return CudaMemory.create(nbytes, device=device)
    name = device if device.startswith("cpu:") else "cpu:0"
    return HostMemory.create(runtime, segment_id, nbytes, device=name)
