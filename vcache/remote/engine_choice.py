"""From the configuration to the engine of a companion: its setup, and the environment that it reads its time-outs from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from vcache.remote.base import EngineSetup
from vcache.store.mooncake_command import address_towards, mooncake_environment, require_mooncake

if TYPE_CHECKING:
    from vcache.config import VCacheConfig


def require_engine() -> None:
    """Raises ``ConfigError`` when what ``transfer.remote`` names is not installed."""
    require_mooncake("set transfer.remote: none")


def reads_gpu_memory() -> bool:
    """Whether the installed engine can read a segment on a GPU.

    Mooncake can if it was built with CUDA. Another build takes the address for one in host memory, over tcp without saying
    so, and crashes at the first read.
    """
    engine = importlib.util.find_spec("mooncake.engine")
    return engine is not None and engine.origin is not None and links_cuda(Path(engine.origin))


def links_cuda(library: Path) -> bool:
    """Whether a shared library names CUDA's runtime among those it needs."""
    return b"libcudart.so" in library.read_bytes()


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
