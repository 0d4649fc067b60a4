"""VCache as a KV connector of vLLM: ``"kv_connector": "VCacheConnector"``, with ``"kv_connector_module_path": "vcache_vllm"``
where vLLM's plugins are switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcache_vllm.connector import VCacheConnector

__all__ = ["VCacheConnector"]


def __getattr__(name: str) -> Any:
    """Imports the connector, and vLLM with it, when it is asked for: ``plugin.py`` is imported while vLLM still is."""
    if name == "VCacheConnector":
        from vcache_vllm.connector import VCacheConnector

        return VCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
