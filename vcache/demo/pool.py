"""The demo's pool: a metadata server and donors, as processes of their own, and what the server says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vcache.config import VCacheConfig
from vcache.demo.processes import Child, Stage
from vcache.errors import UnavailableError
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

START_TIMEOUT_S: Final = 60.0
PATIENCE_S: Final = 30.0
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256


class Donation(NamedTuple):
    """What one donor gives. ``tier``: "vram", "dram", or "auto" by the device."""

    device: str
    nbytes: int
    tier: str = "auto"


def start_pool(stage: Stage, config: VCacheConfig, donations: Sequence[Donation]) -> list[Child]:
    """Starts server and donors, and returns the donors when their segments serve. Raises ``ChildFailed`` or ``UnavailableError``."""
    environment = config.environment()
    stage.start("metadata server", "vram_metadata_server", environment=environment)
    donors = []
    for index, (device, nbytes, tier) in enumerate(donations):
        arguments = ("donate", "--device", device, "--size", str(nbytes), "--tier", tier)
        donors.append(stage.start(f"donor {index} on {device}", "vcache.cli", *arguments, environment=environment))
    await_pool(
        stage,
        config,
        lambda stats: [segment.state for segment in stats.segments] == ["serving"] * len(donations),
        what="the donors' segments to serve",
    )
    return donors


def await_pool(stage: Stage, config: VCacheConfig, reached: Callable[[ServerStats], bool], *, what: str) -> None:
    """Waits until the server says of itself what ``reached`` wants. Raises ``ChildFailed`` or ``UnavailableError``."""

    def ready() -> bool:
        with contextlib.suppress(UnavailableError):
            return reached(server_stats(config))
        return False

    stage.wait_until(ready, what=what, timeout_s=START_TIMEOUT_S)


def server_stats(config: VCacheConfig) -> ServerStats:
    """What the server says of itself."""
    return fetch_stats(config, timeout_s=1.0)


def devices_in_use(stats: ServerStats, tier: str) -> str:
    """The devices of a tier whose segments hold something."""
    return ", ".join(sorted({item.device for item in stats.segments if item.tier == tier and item.records_used}))
