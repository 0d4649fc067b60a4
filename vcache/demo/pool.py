"""The demo's pool: a metadata server and a donor for each device, as processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from vcache.config import VCacheConfig
from vcache.demo.devices import Device
from vcache.demo.processes import Stage
from vcache.errors import UnavailableError
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

START_TIMEOUT_S: Final = 60.0
PATIENCE_S: Final = 30.0
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256


def demo_config(stage: Stage) -> VCacheConfig:
    """This machine's settings, except that everything lives in the demo's own directory, and that it is patient.

    Deadlines of a second are right in production, where a miss costs little; here it would spoil the story.
    """
    runtime_dir = stage.directory / "pool"
    runtime_dir.mkdir(mode=0o700)
    return VCacheConfig(
        runtime_dir=str(runtime_dir),
        chunk_size=CHUNK_SIZE,
        block_size=BLOCK_SIZE,
        server={"endpoint": "", "liveness_timeout": PATIENCE_S},
        client={"call_timeout": PATIENCE_S, "connect_timeout": PATIENCE_S},
    )


def start_pool(stage: Stage, config: VCacheConfig, devices: Sequence[Device], *, segment_bytes: int) -> None:
    """Starts server and donors, and returns when their segments serve. Raises ``ChildFailed`` or ``UnavailableError``."""
    environment = config.environment()
    stage.start("metadata server", "vram_metadata_server", environment=environment)
    for index, device in enumerate(devices):
        arguments = ("donate", "--device", device.name, "--size", str(segment_bytes))
        stage.start(f"donor {index} on {device.name}", "vcache.cli", *arguments, environment=environment)

    def serving() -> bool:
        segments = server_stats(config).segments
        return len(segments) == len(devices) and all(segment.state == "serving" for segment in segments)

    def ready() -> bool:
        with contextlib.suppress(UnavailableError):
            return serving()
        return False

    stage.wait_until(ready, what="the donors' segments to serve", timeout_s=START_TIMEOUT_S)


def server_stats(config: VCacheConfig) -> ServerStats:
    """What the server says of itself."""
    return fetch_stats(config, timeout_s=1.0)


def devices_in_use(stats: ServerStats) -> str:
    """The devices whose segments hold something."""
    return ", ".join(sorted({segment.device for segment in stats.segments if segment.records_used}))
