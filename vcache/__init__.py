"""VCache: pools the spare VRAM of many GPUs into one cache tier for LLM key/value blocks.

Nothing heavy is imported here: the metadata server shares this package and must not load torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.engine import VCacheEngine
    from vcache.keys import ChunkKey, ModelSpec

__version__ = "0.1.0"
__all__ = ["ChunkKey", "ModelSpec", "VCacheConfig", "VCacheEngine"]

_HOME = {
    "ChunkKey": "vcache.keys",
    "ModelSpec": "vcache.keys",
    "VCacheConfig": "vcache.config",
    "VCacheEngine": "vcache.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vcache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
