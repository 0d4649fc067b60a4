"""What lies below the pool: a slower, larger place that lookups go on to where the pool's run of hits ends."""

from __future__ import annotations

from vcache.config import StoreConfig
from vcache.store.base import NullStore, Shard, Store

__all__ = ["NullStore", "Shard", "Store", "open_store"]


def open_store(config: StoreConfig) -> Store:
    """The store that ``store.kind`` names. The caller closes it."""
    kinds = {"none": NullStore}
    return kinds[config.kind]()
