"""The connector's options: ``kv_connector_extra_config``, under the names of ``system_config.yaml``, and two of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vcache.config import VCacheConfig
from vcache.errors import ConfigError

_OWN: Final = ("config_file", "device", "donate")


@dataclass(frozen=True)
class ConnectorOptions:
    """How this engine uses the pool. Bad options raise ``ConfigError`` when the connector is made.

    config: everything that ``system_config.yaml`` has; ``config_file`` names a file to read it from.
    device: the device whose segment is preferred; by default the one that holds the KV tensors. For hosts that stand in for
        GPUs ("cpu:1").
    donate: whether the worker gives a segment of ``segment.size`` to the pool for as long as it lives. Stand-alone donors
        (``vcache donate``) outlive serving processes and are the better choice in production.
    """

    config: VCacheConfig
    device: str | None = None
    donate: bool = False

    @classmethod
    def of(cls, extra: Mapping[str, Any], *, block_size: int) -> ConnectorOptions:
        """Reads ``kv_connector_extra_config``; ``block_size`` is vLLM's and cannot be chosen here."""
        if extra.get("block_size", block_size) != block_size:
            raise ConfigError(
                f"kv_connector_extra_config.block_size = {extra['block_size']!r}: the engine's block size is {block_size}; "
                "leave it out, or start vLLM with another --block-size"
            )
        settings = {name: value for name, value in extra.items() if name not in _OWN}
        device, donate = extra.get("device"), extra.get("donate", False)
        if device is not None and not isinstance(device, str):
            raise ConfigError(
                f"kv_connector_extra_config.device = {device!r}: must be a device's name, such as 'cuda:0'"
            )
        if not isinstance(donate, bool):
            raise ConfigError(
                f"kv_connector_extra_config.donate = {donate!r}: must be true or false; segment.size says how much"
            )
        config = VCacheConfig.load(extra.get("config_file"), **{**settings, "block_size": block_size})
        return cls(config=config, device=device, donate=donate)
