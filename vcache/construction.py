"""What an engine is made with, checked before anything is opened: role, rank, device; and the wait for the pool after it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vcache.config import DEFAULT_ORIGIN, VCacheConfig
from vcache.devices import checked_device, default_device
from vcache.errors import ConfigError
from vcache.keys import ModelSpec

if TYPE_CHECKING:
    import torch

    from vcache.paged_kv import PagedKV
    from vcache.pool.client import PoolClient
    from vcache.pool.donor import Donor

logger = logging.getLogger("vcache.engine")


def check_construction(config: object, model: object, role: str, rank: object, **given: object) -> None:
    """``given``: what only a worker may be given. Raises ``ValueError`` or, for the configuration, ``ConfigError``."""
    if not isinstance(config, VCacheConfig):
        raise ValueError(f"config must be a VCacheConfig (VCacheConfig.load(path) reads a file), got {config!r:.80}")
    if not isinstance(model, ModelSpec):
        raise ValueError(f"model must be a ModelSpec, got {model!r:.80}")
    if role not in ("worker", "scheduler"):
        raise ValueError(f"role must be 'worker' or 'scheduler', got {role!r}")
    if type(rank) is not int or not 0 <= rank < model.ranks:
        raise ValueError(f"rank must be from 0 to {model.ranks - 1} (the model's ranks), got {rank!r}")
    if role == "scheduler":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} must not be given with role='scheduler', which touches no device")
    for name in ("chunk_size", "block_size"):
        configured, described = getattr(config, name), getattr(model, name)
        origin = config.origin(name)
        if configured != described and origin != DEFAULT_ORIGIN:
            raise ConfigError(
                f"{name} = {configured} (from {origin}): the model's description says {described}; make them equal, "
                f"or leave {name} out"
            )


def device_of(device: str | torch.device | None, kv: PagedKV | None) -> torch.device:
    """Where a worker's KV is or will be. ``ValueError`` when ``device`` and the tensors say different things."""
    given = checked_device(device) if device is not None else None
    if kv is None:
        return given or default_device()
    found = checked_device(kv.device)
    if given is None:
        return found
    if given.type != found.type or (given.type == "cuda" and given != found):
        raise ValueError(f"kv_caches is on {found}, device says {given}")
    return given  # torch gives host tensors no ordinal


def await_pool(config: VCacheConfig, client: PoolClient, donor: Donor | None) -> None:
    """Waits for the server, and until it has taken the donated segment, at most ``client.connect_timeout``."""
    started = time.monotonic()
    timeout_s = config.client.connect_timeout
    if not client.wait_available(timeout_s):
        logger.warning(
            "no metadata server answered at %s within %g s; this engine is an empty cache until one does",
            config.endpoint,
            timeout_s,
        )
        return
    left_s = timeout_s - (time.monotonic() - started)
    if donor is not None and not donor.wait_registered(max(0.0, left_s)):
        logger.warning("the donated segment was not taken within %g s; the pool gets it as soon as it can", timeout_s)
