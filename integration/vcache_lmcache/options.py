"""The options of both LMCache modes: a mapping with the names of ``system_config.yaml``, and four of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vcache.config import VCacheConfig
from vcache.devices import checked_device
from vcache.donation import donation_bytes
from vcache.errors import ConfigError

_OWN: Final = ("config_file", "device", "donate", "namespace")
#: Settings that say nothing here, and what to use instead.
_ELSEWHERE: Final = {
    "chunk_size": "LMCache's own chunk_size",
    "block_size": "that of the serving engine",
    "store": "LMCache's own tiers below (another --l2-adapter, remote_storage_plugins)",
}


@dataclass(frozen=True)
class LMCacheOptions:
    """How one LMCache process uses the pool. Bad options raise ``ConfigError``.

    config: everything that ``system_config.yaml`` has; ``config_file`` names a file to read it from.
    device: the device whose segment is preferred, and that ``donate`` takes memory of.
    donate_bytes: what this process gives to the pool for as long as it lives (0: nothing). Stand-alone donors
        (``vcache donate``) outlive it and are the better choice in production.
    namespace: what tells models apart that LMCache knows by one name (another revision, say); part of every key.
    """

    config: VCacheConfig
    device: str = "cpu:0"
    donate_bytes: int = 0
    namespace: str = ""

    def without_donation(self) -> LMCacheOptions:
        """The same, for a process that gives nothing."""
        return replace(self, donate_bytes=0)

    @classmethod
    def of(cls, given: object, *, where: str) -> LMCacheOptions:
        """Reads the options; ``where`` is what the errors call them."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where} = {given!r}: must be a mapping of options, such as {{donate: 8GiB}}")
        for name in _ELSEWHERE.keys() & given.keys():
            raise ConfigError(f"{where}.{name}: does not apply under LMCache; use {_ELSEWHERE[name]}")
        settings = {name: value for name, value in given.items() if name not in _OWN}
        device, namespace = _text(given, "device", "cpu:0", where), _text(given, "namespace", "", where)
        config_file = _text(given, "config_file", "", where)
        try:
            config = VCacheConfig.load(config_file or None, **settings)
            donate: Any = given.get("donate")
            nbytes = donation_bytes(config, donate) if donate else 0
            checked_device(device)
        except (ConfigError, ValueError, TypeError) as error:  # TypeError: a name that is no text
            raise ConfigError(f"{where}: {error}") from None
        return cls(config=config, device=device, donate_bytes=nbytes, namespace=namespace)


def _text(given: Mapping[Any, Any], name: str, otherwise: str, where: str) -> str:
    value = given.get(name, otherwise)
    if not isinstance(value, str):
        raise ConfigError(f"{where}.{name} = {value!r}: must be text")
    return value
