"""From the configuration to the engine of a companion: its setup, and the environment that it reads its time-outs from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcache.remote.base import EngineSetup
from vcache.store.mooncake_command import address_towards, mooncake_environment, require_mooncake

if TYPE_CHECKING:
    from vcache.config import VCacheConfig


def require_engine(config: VCacheConfig) -> None:
    """Raises ``ConfigError`` when what ``transfer.remote`` names is not installed."""
    require_mooncake("set transfer.remote: none")


def engine_setup(config: VCacheConfig) -> EngineSetup:
    """As of now: the address of this host may change."""
    settings = config.transfer.mooncake
    hostname = settings.hostname or _address_towards_server(config)
    return EngineSetup(config.transfer.remote, settings.protocol, settings.devices, hostname)


def engine_environment(config: VCacheConfig, setup: EngineSetup) -> dict[str, str]:
    """Of a companion: time-outs as short as the engine knows them, and the transport that was asked for."""
    environment = mooncake_environment(setup.hostname, config.transfer.remote_timeout)
    if setup.protocol == "tcp":
        environment.setdefault("MC_FORCE_TCP", "1")  # else it takes what devices it finds
    return environment


def _address_towards_server(config: VCacheConfig) -> str:
    if not config.endpoint.startswith("tcp://"):
        return "127.0.0.1"  # a server that no other host reaches
    return address_towards(config.endpoint.removeprefix("tcp://"))
