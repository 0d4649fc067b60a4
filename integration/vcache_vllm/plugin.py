"""vLLM's ``vllm.general_plugins`` entry point: makes ``"kv_connector": "VCacheConnector"`` known in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Names the connector to vLLM, which imports it only when it is used. vLLM may call this more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "VCacheConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("VCacheConnector", "vcache_vllm.connector", "VCacheConnector")
