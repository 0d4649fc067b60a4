"""What the state machine needs to know of the configuration; the pure service depends on nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vcache.config import VCacheConfig

PlacementPolicy = Literal["local_first", "most_free"]
EvictionPolicyName = Literal["lru"]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Deadlines in seconds, watermarks as fractions of a segment's data bytes and of its records."""

    heartbeat_s: float = 1.0
    liveness_s: float = 10.0
    reservation_s: float = 30.0
    incomplete_s: float = 60.0
    max_lease_s: float = 60.0
    placement: PlacementPolicy = "local_first"
    eviction_policy: EvictionPolicyName = "lru"
    high_watermark: float = 0.95
    low_watermark: float = 0.90
    demotion_s: float = 10.0
    pull: bool = True
    max_message_bytes: int = 4 << 20
    #: Records looked at, and entries evicted, in one tick: what bounds a tick's time.
    sweep_batch: int = 2048
    eviction_batch: int = 256

    @classmethod
    def of(cls, config: VCacheConfig) -> ServiceSettings:
        server = config.server
        return cls(
            heartbeat_s=server.heartbeat_interval,
            liveness_s=server.liveness_timeout,
            reservation_s=server.reservation_timeout,
            incomplete_s=server.incomplete_timeout,
            max_lease_s=server.max_lease,
            placement=server.placement,
            eviction_policy=server.eviction.policy,
            high_watermark=server.eviction.high_watermark,
            low_watermark=server.eviction.low_watermark,
            demotion_s=server.eviction.demotion_timeout,
            pull=server.eviction.pull,
            max_message_bytes=server.max_message_bytes,
        )
