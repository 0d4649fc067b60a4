"""VCacheAllocatorBackend: the pool as the allocator of LMCache's in-process mode, so that nothing is copied but the KV itself.

The process donates a segment, and LMCache's chunks are computed right into it: a put gives them their keys, a get answers what
lies in the segment where it lies. Such bytes stay what they are for as long as LMCache has a reference: the donor, which is this
process, does not retire a record that is held (``vcache/pool/holds.py``). What lies in other segments is copied, as
``VCacheBackend`` does it. LMCache takes the plugin of the name ``LocalCPUBackend`` for its allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import torch
from lmcache.utils import CacheEngineKey, get_size_bytes
from lmcache.v1.memory_management import MemoryAllocatorInterface, MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface

from vcache.errors import CapacityError, ConfigError
from vcache.memory.base import is_host
from vcache.pool.own_records import OwnRecord
from vcache.pool.own_space import AT_ONCE, Filled, OwnSpace
from vcache.pool.segment import EXTENT_ALIGNMENT
from vcache.protocol import Outcome
from vcache_lmcache.keys import layout_of
from vcache_lmcache.object_pool import Held, InPlace
from vcache_lmcache.options import LMCacheOptions
from vcache_lmcache.segment_objects import SegmentAllocator, SegmentObject
from vcache_lmcache.storage_plugin import VCacheBackend, format_of

if TYPE_CHECKING:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

_NAME: Final = "LocalCPUBackend"


class VCacheAllocatorBackend(VCacheBackend, AllocatorBackendInterface):
    """As ``VCacheBackend``, and in place of LMCache's own host memory. Needs the option ``donate``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._space: OwnSpace | None = None
        self._allocator: SegmentAllocator | None = None
        super().__init__(*args, **kwargs)

    def _open(self, config: LMCacheEngineConfig | None, metadata: LMCacheMetadata | None) -> None:
        super()._open(config, metadata)
        donor = self._pool.donor
        if donor is not None:
            self._space = OwnSpace(self._pool.client, donor, tenant=self._tenant)
            try:
                self._allocator = SegmentAllocator(donor, self._space)
            except CapacityError:
                self._pool.close()
                raise

    def _options(self, config: LMCacheEngineConfig | None, metadata: LMCacheMetadata | None) -> LMCacheOptions:
        options = super()._options(config, metadata)
        assert config is not None
        if _NAME not in (config.storage_plugins or ()) or config.max_local_cpu_size > 0:
            raise ConfigError(
                f"storage_plugins = {config.storage_plugins!r}, max_local_cpu_size = {config.max_local_cpu_size}: "
                f"VCacheAllocatorBackend is LMCache's allocator under the name {_NAME} only, and with max_local_cpu_size: 0"
            )
        if config.enable_pd:
            raise ConfigError(
                "enable_pd = true: LMCache then has another allocator; use VCacheBackend, or enable_pd: false"
            )
        if metadata is not None and metadata.role == "scheduler":
            return options.without_donation()  # it only looks things up
        if not is_host(options.device):  # LMCache's copies within a GPU may still run when it lets go of an object
            raise ConfigError(
                f"extra_config.vcache.device = {options.device!r}: LMCache's chunks need host memory; use cpu:0"
            )
        if not options.donate_bytes:
            raise ConfigError("extra_config.vcache.donate: needed, as the memory of LMCache's chunks; such as 8GiB")
        return options

    # --- memory ---------------------------------------------------------------------------------------------------

    def initialize_allocator(self, config: LMCacheEngineConfig, metadata: LMCacheMetadata) -> MemoryAllocatorInterface:
        return self.get_memory_allocator()

    def get_memory_allocator(self) -> MemoryAllocatorInterface:
        if self._allocator is None:
            raise CapacityError("a scheduler's process has no memory for chunks")
        return self._allocator

    def get_allocator_backend(self) -> AllocatorBackendInterface | None:
        return self if self._allocator is not None else None

    def allocate(
        self,
        shapes: torch.Size | list[torch.Size],
        dtypes: torch.dtype | list[torch.dtype],
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> MemoryObj | None:
        """``None`` when the segment has no room now: eviction makes some in the background, ahead of the next store."""
        return self.get_memory_allocator().allocate(shapes, dtypes, fmt or self._format)

    def batched_allocate(
        self,
        shapes: torch.Size | list[torch.Size],
        dtypes: torch.dtype | list[torch.dtype],
        batch_size: int,
        fmt: MemoryFormat | None = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> list[MemoryObj] | None:
        objs: list[MemoryObj] | None
        objs = self.get_memory_allocator().batched_allocate(shapes, dtypes, batch_size, fmt or self._format)
        return objs

    def calculate_chunk_budget(self) -> int:
        """Chunks that fit into the segment."""
        donor = self._pool.donor
        if donor is None or self.metadata is None:
            return 0
        nbytes: int = get_size_bytes(self.metadata.get_shapes(), self.metadata.get_dtypes())
        aligned = -(-nbytes // EXTENT_ALIGNMENT) * EXTENT_ALIGNMENT
        return (donor.segment.nbytes - donor.segment.data_offset) // aligned

    @property
    def _format(self) -> MemoryFormat:
        return format_of(self.metadata) if self.metadata is not None else MemoryFormat.KV_2LTD

    # --- put and get ----------------------------------------------------------------------------------------------

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> list[Future[None]] | None:
        """They become chunks of the pool where they are. LMCache writes to them no more."""
        allocator = self._allocator
        own = [obj for obj in objs if isinstance(obj, SegmentObject) and obj.extent is not None and obj.record < 0]
        if allocator is None or len(own) < len(objs):
            return super().batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback)
        if not allocator.begin_put(own):
            return None
        engine_keys = list(keys)
        filled = [
            Filled(obj.extent, key, layout_of(obj), obj.get_num_tokens())
            for obj, key in zip(own, self._keys.of_chunks(keys), strict=True)
            if obj.extent is not None
        ]
        put = self._submit_put(
            [one.key for one in filled],
            lambda: self._put_in_place(engine_keys, filled, own, on_complete_callback),
        )
        if put is None:
            for obj in own:
                allocator.end_put(obj, is_stored=False)
        return [put] if put is not None else None

    def _put_in_place(
        self,
        keys: Sequence[CacheEngineKey],
        filled: Sequence[Filled],
        objs: Sequence[SegmentObject],
        on_complete_callback: Callable[[CacheEngineKey], None] | None,
    ) -> None:
        space, allocator = self._space, self._allocator
        assert space is not None and allocator is not None
        outcomes = [Outcome.DECLINED] * len(objs)
        try:
            with self._pool.failures.contained("put"):
                outcomes = space.store(filled)
        finally:
            for obj, outcome in zip(objs, outcomes, strict=True):
                allocator.end_put(obj, is_stored=outcome is Outcome.GRANTED)
        if self._pool.own_records is not None:
            self._pool.own_records.saw(
                (one.key, OwnRecord(extent.record, extent.generation, extent.offset, extent.nbytes, one.layout))
                for one, outcome in zip(filled, outcomes, strict=True)
                if outcome is Outcome.GRANTED and (extent := one.extent)
            )
        with self._pool.failures.contained("restock"):
            if (
                Outcome.GRANTED in outcomes
            ):  # here, rather than when LMCache waits for it: the next prompt may be as long
                space.restock(filled[0].extent.nbytes, max(len(filled), AT_ONCE))
        if on_complete_callback is not None:
            self._say_complete(keys, on_complete_callback)

    def clear(self) -> int:
        cleared = super().clear()
        with self._pool.failures.contained("restock"):
            if self._space is not None:
                self._space.renew()
        return cleared

    def _in_place(self, objs: list[MemoryObj | None]) -> InPlace | None:
        allocator = self._allocator
        if allocator is None:
            return None

        def answer(held: Held) -> bool:
            form = self._forms.of(held.nbytes, held.layout)
            if form is not None:
                objs[held.at] = allocator.hold(held, *form)
            return form is not None

        return answer

    def close(self) -> None:
        self._putting.shutdown(wait=True)
        if self._space is not None and self._allocator is not None:
            self._space.close()
            self._allocator.close()
        super().close()
