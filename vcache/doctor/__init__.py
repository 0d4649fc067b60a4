"""``vcache doctor``: what of a machine works for the pool, what does not, and what to do about it.

Each module examines one thing and yields findings. Nothing they make outlives the examination, save the runtime directory, which
any process of the pool would make.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vcache.doctor.finding import Finding, State

if TYPE_CHECKING:
    from vcache.config import VCacheConfig

__all__ = ["Finding", "State", "examine"]


def examine(config: VCacheConfig, *, timeout_s: float) -> Iterator[Finding]:
    """Everything, one thing after the other; ``timeout_s`` is for each answer that is waited for."""
    from vcache.doctor import gpus, host, pool, stores

    yield from host.examine(config)
    yield from pool.examine(config, timeout_s=timeout_s)
    yield from stores.examine(config, timeout_s=timeout_s)
    yield from gpus.examine(config, timeout_s=timeout_s)
