"""The connector's options: ``kv_connector_extra_config``, under the names of ``system_config.yaml``, and a few of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vcache.config import VCacheConfig
from vcache.errors import ConfigError

#: Switches: true or false.
_SWITCHES: Final = ("donate", "load_async", "store_decoded")
_NAMES: Final = {
    "device": "a device's name, such as 'cuda:0'",
    "weights": "a name of your own, such as 'ours/llama-8b@7'",
}
_OWN: Final = ("config_file", *_NAMES, *_SWITCHES)


@dataclass(frozen=True)
class ConnectorOptions:
    """How this engine uses the pool. Bad options raise ``ConfigError`` when the connector is made.

    config: everything that ``system_config.yaml`` has; ``config_file`` names a file to read it from.
    device: the device whose segment is preferred; by default the one that holds the KV tensors. For hosts that stand in for
        GPUs ("cpu:1").
    donate: whether the worker gives a segment of ``segment.size`` to the pool for as long as it lives. Stand-alone donors
        (``vcache donate``) outlive serving processes and are the better choice in production.
    load_async: whether requests wait for their loads outside of vLLM's steps, so that no forward pass waits for one.
    weights: what the model's weights are called in place of a digest of its local files, which are then not read. It must be another
        for other weights.
    store_decoded: whether chunks that end in generated tokens are stored too, for the next turn of a conversation.
    """

    config: VCacheConfig
    device: str | None = None
    weights: str | None = None
    donate: bool = False
    load_async: bool = False
    store_decoded: bool = False

    @classmethod
    def of(cls, extra: Mapping[str, Any], *, block_size: int) -> ConnectorOptions:
        """Reads ``kv_connector_extra_config``; ``block_size`` is vLLM's and cannot be chosen here."""
        if extra.get("block_size", block_size) != block_size:
            raise ConfigError(
                f"kv_connector_extra_config.block_size = {extra['block_size']!r}: the engine's block size is {block_size}; "
                "leave it out, or start vLLM with another --block-size"
            )
        settings = {name: value for name, value in extra.items() if name not in _OWN}
        names = {name: extra[name] for name in _NAMES if extra.get(name) is not None}
        for name, value in names.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"kv_connector_extra_config.{name} = {value!r}: must be {_NAMES[name]}")
        switches = {name: extra[name] for name in _SWITCHES if name in extra}
        for name, value in switches.items():
            if not isinstance(value, bool):
                hint = "; segment.size says how much" if name == "donate" else ""
                raise ConfigError(f"kv_connector_extra_config.{name} = {value!r}: must be true or false{hint}")
        config = VCacheConfig.load(extra.get("config_file"), **{**settings, "block_size": block_size})
        return cls(config=config, **names, **switches)
