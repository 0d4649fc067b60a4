"""The engine's counters: their names, what each means, and a thread-safe place to add to them.

``docs/python-api.md`` documents every name; a test keeps the two equal.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

from vcache.protocol import ServerStats, Tier

#: Counters of this engine. They only ever grow.
ENGINE_COUNTERS: Final = {
    "hits": "chunks that retrieve loaded",
    "store_hits": "of these, from the store below the pool",
    "misses": "chunks that retrieve was asked for and did not load",
    "validation_failures": "chunks read whose record had changed meanwhile: not served",
    "failures": "calls that the pool, the server, a donor or the store failed, and that became misses",
    "lookup_calls": "calls of lookup",
    "lookup_seconds": "time spent in lookup, after the prompt was hashed",
    "lookup_chunks": "chunks that lookup was asked for",
    "lookup_hits": "chunks that lookup found, in the pool or the store",
    "retrieve_calls": "calls of retrieve",
    "retrieve_seconds": "time spent in retrieve, after the prompt was hashed",
    "store_calls": "calls of store",
    "store_seconds": "time spent in store, after the prompt was hashed",
    "stored": "chunks that store wrote and committed",
    "store_exists": "chunks that store skipped: present, or being written by another",
    "store_no_space": "chunks that store skipped: no free space in the pool",
    "store_declined": "chunks that store skipped: no segment to write to, or none they fit in",
    "store_lost": "chunks written whose reservation had ended before the commit",
    "unconfirmed_removals": "removals that the server or the store did not confirm: what was to go may still be there",
}
for _tier in ("vram", "dram", "store"):
    for _direction in ("read", "written"):
        ENGINE_COUNTERS[f"{_tier}_{_direction}_bytes"] = f"bytes {_direction}, {_tier} tier"
        ENGINE_COUNTERS[f"{_tier}_{_direction}_seconds"] = f"time in which they were {_direction}"

#: The server's state as of this call; zeros when it does not answer.
SERVER_VALUES: Final = {
    "server_available": "whether the metadata server answers",
    "server_term": "its life: unix milliseconds of its start",
    "server_uptime_seconds": "time since its start",
    "server_entries": "chunks it knows",
    "server_leases": "leases now held by readers",
    "server_reservations": "reservations now held by writers",
    "server_pins": "chunks pinned now",
    "server_sessions": "clients and donors connected",
    "server_segments": "segments in the pool",
    "evictions": "chunks it evicted in this term",
    "pool_vram_bytes": "size of all segments in VRAM",
    "pool_vram_used_bytes": "of these, in use",
    "pool_dram_bytes": "size of all segments in host memory",
    "pool_dram_used_bytes": "of these, in use",
}

StatsValue = int | float | bool | str


class Counters:
    """The ``ENGINE_COUNTERS`` of one engine. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int | float] = {
            name: 0.0 if name.endswith("_seconds") else 0 for name in ENGINE_COUNTERS
        }

    def add(self, **amounts: float) -> None:
        """Adds to counters by name. An unknown name is a ``KeyError``: a counter nobody documented."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def moved(self, direction: str, bytes_by_tier: Mapping[Tier, int], seconds: float) -> None:
        """Bytes that one call read or wrote; its time is divided among the tiers by bytes."""
        total = sum(bytes_by_tier.values())
        for tier, nbytes in bytes_by_tier.items():
            name = f"{tier_name(tier)}_{direction}"
            self.add(**{f"{name}_bytes": nbytes, f"{name}_seconds": seconds * nbytes / total})

    def snapshot(self) -> dict[str, int | float]:
        with self._lock:
            return dict(self._values)


def tier_name(tier: Tier) -> str:
    return tier.name.lower()


def server_values(stats: ServerStats | None) -> dict[str, StatsValue]:
    """The ``SERVER_VALUES`` that a server's answer gives (``None``: it does not answer)."""
    if stats is None:
        return {name: False if name == "server_available" else 0 for name in SERVER_VALUES}
    return {
        "server_available": True,
        "server_term": stats.term,
        "server_uptime_seconds": stats.uptime_s,
        "server_entries": stats.entries,
        "server_leases": stats.leases,
        "server_reservations": stats.reservations,
        "server_pins": stats.pins,
        "server_sessions": stats.sessions,
        "server_segments": len(stats.segments),
        "evictions": stats.counters.get("evicted", 0),
        **_pool_bytes(stats),
    }


def _pool_bytes(stats: ServerStats) -> dict[str, StatsValue]:
    values: dict[str, StatsValue] = {}
    for tier in Tier:
        segments = [segment for segment in stats.segments if segment.tier == tier_name(tier)]
        values[f"pool_{tier_name(tier)}_bytes"] = sum(segment.total_bytes for segment in segments)
        values[f"pool_{tier_name(tier)}_used_bytes"] = sum(segment.used_bytes for segment in segments)
    return values
