"""The settings of how bytes move (``transfer.*``): copies on this host, and reads from other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field

from vcache.setting_types import Count, Seconds, SecondsOrNever, Section, Size

#: As many take part in a copy at most (``copy_blocks.c``).
MAX_THREADS: Final = 64


class TransferEngineConfig(Section):
    """Mooncake's TransferEngine: what it travels on, and under which address other hosts reach this one."""

    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""
    hostname: str = ""


class TransferConfig(Section):
    """How bytes are copied."""

    threads: Annotated[Count, Field(ge=0, le=MAX_THREADS)] = 0
    peer_way: Literal["auto", "kernel", "copy"] = "auto"
    unmap_after: SecondsOrNever = 600.0
    remote: Literal["none", "mooncake"] = "none"
    remote_timeout: Seconds = 1.0
    staging_size: Annotated[Size, Field(ge=1 << 20)] = 256 << 20
    mooncake: TransferEngineConfig = Field(default_factory=TransferEngineConfig)

    def problems(self) -> Iterator[str]:
        """What contradicts what, in words for a ``ConfigError``."""
        if self.remote == "mooncake" and self.mooncake.protocol == "rdma" and not self.mooncake.devices:
            yield (
                "transfer.mooncake.protocol = 'rdma': needs transfer.mooncake.devices, such as mlx5_0 "
                "(`ibv_devices` lists them)"
            )
