"""The eviction policies by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vram_metadata_server.eviction.base import EvictionPolicy
from vram_metadata_server.eviction.lru import LeafLRU
from vram_metadata_server.settings import EvictionPolicyName

POLICIES: Final[dict[EvictionPolicyName, Callable[[], EvictionPolicy]]] = {"lru": LeafLRU}
