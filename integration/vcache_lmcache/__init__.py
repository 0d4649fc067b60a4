"""VCache under LMCache: an L2 adapter for its MP mode (``lmcache server``), a storage plugin for its in-process mode."""

from vcache_lmcache.allocator_backend import VCacheAllocatorBackend
from vcache_lmcache.l2_adapter import VCacheL2Adapter
from vcache_lmcache.storage_plugin import VCacheBackend

__all__ = ["VCacheAllocatorBackend", "VCacheBackend", "VCacheL2Adapter"]
