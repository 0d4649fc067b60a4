"""What lies below the pool: a slower, larger place that lookups go on to where the pool's run of hits ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from vcache.store.base import Got, Put, Shard, Store

if TYPE_CHECKING:
    from vcache.store.guard import GuardedStore
    from vcache.store.staging import Staging
    from vcache.store_config import StoreConfig

__all__ = ["Got", "Put", "Shard", "Store", "open_store"]


#: What a store needs to answer what it holds; payloads need ``store.staging_size``.
LEAST_STAGING_BYTES: Final = 1 << 20


def open_store(config: StoreConfig, *, moves: bool = True) -> GuardedStore | None:
    """The store that ``config`` names, guarded, or ``None``. Returns at once, whether or not the store can be reached.

    ``moves``: whether payloads will be read and written; without, there is hardly any memory for them. The caller closes
    the store. Raises ``CapacityError`` when there is no memory for staging, ``ConfigError`` when what the store needs is
    not installed.
    """
    kind = config.resolved_kind
    if kind == "none":
        return None
    from vcache.store.guard import GuardedStore
    from vcache.store.staging import Staging

    staging = Staging(config.staging_size if moves else LEAST_STAGING_BYTES)
    try:
        store = _bare_store(kind, config, staging)
    except BaseException:
        staging.close()  # nobody else would
        raise
    return GuardedStore(store, staging, config.guard, name=kind)


def _bare_store(kind: str, config: StoreConfig, staging: Staging) -> Store:
    if kind == "files":
        from vcache.store.files import FileStore

        return FileStore(Path(config.files.directory), size_limit=config.files.size_limit)
    from vcache.store.mooncake import MooncakeStore

    timeouts = {"timeout_s": config.guard.timeout, "write_timeout_s": config.guard.write_timeout}
    return MooncakeStore(config.mooncake, staging, **timeouts)
