"""VCache as a KV connector of vLLM: ``"kv_connector": "VCacheConnector", "kv_connector_module_path": "vcache_vllm"``."""

from vcache_vllm.connector import VCacheConnector

__all__ = ["VCacheConnector"]
