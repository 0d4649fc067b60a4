"""VCacheBackend: the pool as a storage plugin of LMCache's in-process mode (``storage_plugins: "vcache"``).

A get copies payloads into memory of LMCache's own allocator, and answers only what was valid after the copy. A put is done in
the background, in order, with a reference of its own to each object; what is asked for while its put is under way is waited
for. Not here: the pool (``object_pool.py``), keys, pins.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface, StoragePluginInterface

from vcache.errors import ConfigError, VCacheError
from vcache.keys import ChunkKey, tenant_of
from vcache_lmcache.held_keys import HeldKeys
from vcache_lmcache.keys import KeyMaker, flat_bytes, layout_of, layout_word
from vcache_lmcache.object_pool import InPlace, NewObject, ObjectPool
from vcache_lmcache.options import LMCacheOptions

if TYPE_CHECKING:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

logger: Final = logging.getLogger(__name__)

#: How long ``pin`` keeps a chunk (a lookup's pin is a lease, and lasts ``server.max_lease`` at most).
PIN_S: Final = 3600.0

Form = tuple[list[torch.Size], list[torch.dtype], MemoryFormat]


class VCacheBackend(StoragePluginInterface):
    """Made by LMCache, which hands over its configuration; the options are the mapping ``extra_config["vcache"]``.

    LMCache only logs what a plugin's constructor raises, and would go on without the cache it was configured to have. So what
    cannot work (a bad option, too little memory) ends the process instead, by ``SystemExit``, with the reason.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: LMCacheEngineConfig | None = None,
        metadata: LMCacheMetadata | None = None,
        local_cpu_backend: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        try:
            self._open(config, metadata)
        except VCacheError as error:
            logger.critical("VCache cannot be used as configured: %s", error)
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)  # or the storage manager's thread keeps the process alive
            raise SystemExit(f"VCache cannot be used as configured: {error}") from error
        if "PYTHONHASHSEED" not in os.environ:
            logger.warning(
                "PYTHONHASHSEED is not set: LMCache's in-process mode then names equal chunks differently in each process, and "
                "none finds what another stored; start them all with PYTHONHASHSEED=0"
            )
        self._pins = HeldKeys(self._pool.release)
        self._pinned: set[ChunkKey] = set()
        self._forms = Forms(metadata)
        self._putting = ThreadPoolExecutor(1, thread_name_prefix="vcache-put")
        self._puts: dict[ChunkKey, Future[None]] = {}
        self._puts_lock = threading.Lock()
        if local_cpu_backend is not None:
            self._outlive_puts(local_cpu_backend)

    def __str__(self) -> str:
        return type(self).__name__

    def _open(self, config: LMCacheEngineConfig | None, metadata: LMCacheMetadata | None) -> None:
        """Joins the pool. Raises ``VCacheError`` for what cannot work."""
        options = self._options(config, metadata)
        model = metadata.model_name if metadata is not None else ""
        self._tenant = tenant_of(f"lmcache\0{options.namespace}\0{model}")
        self._keys = KeyMaker(options.namespace)
        self._pool = ObjectPool(options, role=f"lmcache worker {metadata.worker_id if metadata else 0}")

    def _options(self, config: LMCacheEngineConfig | None, metadata: LMCacheMetadata | None) -> LMCacheOptions:
        """What LMCache's configuration says of VCache. Raises ``ConfigError``."""
        if config is None:
            raise ConfigError("LMCache handed over no configuration")
        if config.use_layerwise:
            raise ConfigError(
                "use_layerwise = true: LMCache's layer-wise load cannot skip a chunk that has gone meanwhile, so VCacheBackend "
                "does not take part; set use_layerwise: false"
            )
        extra = config.extra_config or {}
        return LMCacheOptions.of(extra.get("vcache") or {}, where="extra_config.vcache")

    # --- what is there --------------------------------------------------------------------------------------------

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """The leading run that is there; with ``pin`` leased until ``unpin`` of its keys, ``server.max_lease`` at most."""
        if len(keys) > 1 and not self._puts and self._pool.is_known_absent(self._keys.of_chunks(keys[:1])[0]):
            return 0  # most prompts that are not there are not from the first chunk on
        chunk_keys = self._keys.of_chunks(keys)
        self._await_puts(chunk_keys)
        hits, lease = self._pool.lookup(chunk_keys, leased=pin, waits=False)
        self._pins.hold(chunk_keys[:hits], lease, self._pool.lock_s)
        return hits

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As ``batched_contains``, but nothing is pinned: LMCache loads at once and unpins only what it loaded."""
        return await asyncio.to_thread(self.batched_contains, keys)

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        return self._keys.of_chunks([key])[0] in self._puts

    # --- put ------------------------------------------------------------------------------------------------------

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> list[Future[None]] | None:
        """``keys`` are consecutive chunks of a prompt; their memory is free again once the put is done."""
        keys, objs = list(keys), list(objs)
        chunk_keys = self._keys.of_chunks(keys)
        for obj in objs:
            obj.ref_count_up()
        put = self._submit_put(chunk_keys, lambda: self._put(keys, chunk_keys, objs, on_complete_callback))
        if put is None:
            for obj in objs:
                obj.ref_count_down()
        return [put] if put is not None else None

    def _submit_put(self, chunk_keys: Sequence[ChunkKey], work: Callable[[], None]) -> Future[None] | None:
        """Has the put done behind those before it; what asks for these keys waits for it. ``None``: this is closed."""
        with self._puts_lock:
            try:
                put = self._putting.submit(work)
            except RuntimeError:
                return None
            self._puts.update(dict.fromkeys(chunk_keys, put))
        put.add_done_callback(lambda done: self._put_is_over(chunk_keys, done))
        return put

    def _put_is_over(self, chunk_keys: Sequence[ChunkKey], put: Future[None]) -> None:
        with self._puts_lock:
            for key in chunk_keys:
                if self._puts.get(key) is put:  # not one of the same chunk that came later
                    del self._puts[key]

    def _put(
        self,
        keys: Sequence[CacheEngineKey],
        chunk_keys: Sequence[ChunkKey],
        objs: Sequence[MemoryObj],
        on_complete_callback: Callable[[CacheEngineKey], None] | None,
    ) -> None:
        try:
            with self._pool.failures.contained("put"):
                self._pool.store(
                    [
                        NewObject(key, flat_bytes(obj), layout_of(obj), obj.get_num_tokens(), self._tenant)
                        for key, obj in zip(chunk_keys, objs, strict=True)
                    ],
                    chained=True,
                )
        finally:
            for obj in objs:
                obj.ref_count_down()
        if on_complete_callback is not None:
            self._say_complete(keys, on_complete_callback)

    def _say_complete(
        self, keys: Sequence[CacheEngineKey], on_complete_callback: Callable[[CacheEngineKey], None]
    ) -> None:
        for key in keys:
            with self._pool.failures.contained("on_complete_callback"):
                on_complete_callback(key)

    def _outlive_puts(self, allocator: Any) -> None:
        """LMCache closes the allocator before its plugins: what puts under way read from would be freed under them."""
        close = allocator.close

        def close_after_puts() -> None:
            self._putting.shutdown(wait=True)
            close()

        allocator.close = close_after_puts

    def _await_puts(self, chunk_keys: Sequence[ChunkKey]) -> None:
        if self._puts:
            with self._puts_lock:
                under_way = {put for key in chunk_keys if (put := self._puts.get(key)) is not None}
            if under_way:
                wait(under_way, timeout=self._pool.config.client.call_timeout)

    # --- get ------------------------------------------------------------------------------------------------------

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """An object for each key whose payload is there in a form that this engine uses; the caller's to ``ref_count_down``."""
        allocator = self.get_allocator_backend()
        objs: list[MemoryObj | None] = [None] * len(keys)
        if allocator is None:  # a scheduler has none: it only looks things up
            return objs

        def target_of(index: int, nbytes: int, layout: int) -> torch.Tensor | None:
            form = self._forms.of(nbytes, layout)
            obj = allocator.allocate(*form, busy_loop=False) if form is not None else None
            if obj is None:
                return None
            objs[index] = obj
            return flat_bytes(obj)

        chunk_keys = self._keys.of_chunks(keys)
        self._await_puts(chunk_keys)
        layouts = [self._forms.whole_chunk()] * len(keys)
        loaded = self._pool.load(chunk_keys, layouts, target_of, self._in_place(objs))
        for index, obj in enumerate(objs):
            if obj is not None and not loaded[index]:
                obj.ref_count_down()
                objs[index] = None
        return objs

    def _in_place(self, objs: list[MemoryObj | None]) -> InPlace | None:
        """How a get answers payloads where they lie, where that is safe: see ``VCacheAllocatorBackend``."""
        return None

    def get_non_blocking(self, key: CacheEngineKey, location: str | None = None) -> Future[MemoryObj | None] | None:
        return None  # LMCache asks the next backend, or for a batch

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey], transfer_spec: Any = None
    ) -> list[MemoryObj]:
        """The leading run that could be loaded."""
        objs = await asyncio.to_thread(self.batched_get_blocking, keys)
        run = next((index for index, obj in enumerate(objs) if obj is None), len(objs))
        for obj in objs[run:]:
            if obj is not None:
                obj.ref_count_down()
        return [obj for obj in objs[:run] if obj is not None]

    # --- pins and removal -----------------------------------------------------------------------------------------

    def pin(self, key: CacheEngineKey) -> bool:
        """Kept from eviction until ``unpin``, for an hour at most."""
        chunk_keys = self._keys.of_chunks([key])
        self._await_puts(chunk_keys)
        is_there = self._pool.pin(chunk_keys, PIN_S) == 1
        if is_there:
            self._pinned.update(chunk_keys)
        return is_there

    def unpin(self, key: CacheEngineKey) -> bool:
        """Ends one pin: of a lookup if there is one, else that of ``pin``."""
        chunk_keys = self._keys.of_chunks([key])
        if self._pins.let_go(chunk_keys):
            return True
        if chunk_keys[0] not in self._pinned:
            return False
        self._pinned.discard(chunk_keys[0])
        return self._pool.unpin(chunk_keys) == 1

    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        return self.batched_remove([key], force) == 1

    def batched_remove(self, keys: list[CacheEngineKey], force: bool = True) -> int:
        """For every process that shares the pool, whoever has pinned them."""
        chunk_keys = self._keys.of_chunks(keys)
        self._await_puts(chunk_keys)
        self._pinned.difference_update(chunk_keys)
        return self._pool.remove(chunk_keys) or 0

    def clear(self) -> int:
        """Removes what LMCache's in-process mode has stored of this model, in this namespace; how many tokens."""
        self._await_puts(list(self._puts))
        self._pinned.clear()
        return (self._pool.clear(self._tenant) or 0) * self._forms.chunk_tokens

    # --- the rest -------------------------------------------------------------------------------------------------

    def touch_cache(self) -> None:
        """Nothing to do: the server orders its chunks by what it is asked for."""

    def get_allocator_backend(self) -> AllocatorBackendInterface:
        return self.local_cpu_backend

    def close(self) -> None:
        self._putting.shutdown(wait=True)
        self._pins.let_go_all()
        self._pool.close()


class Forms:
    """What this engine's chunks look like: shapes, dtypes and format for a payload of so many bytes."""

    def __init__(self, metadata: LMCacheMetadata | None) -> None:
        self._metadata = metadata
        self._known: dict[tuple[int, int], Form] = {}

    @property
    def chunk_tokens(self) -> int:
        return self._metadata.chunk_size if self._metadata is not None else 0

    def of(self, nbytes: int, layout: int) -> Form | None:
        """``None`` when a payload of this size and layout word is none of this engine's."""
        known = self._known.get((nbytes, layout))
        if known is not None or self._metadata is None:
            return known
        metadata = self._metadata
        dtypes = metadata.get_dtypes()
        token_bytes = sum(
            prod(shape) * dtype.itemsize for shape, dtype in zip(metadata.get_shapes(1), dtypes, strict=True)
        )
        tokens, rest = divmod(nbytes, token_bytes)
        form = metadata.get_shapes(tokens), dtypes, format_of(metadata)
        if rest or layout != layout_word(*form):
            return None
        self._known[nbytes, layout] = form
        return form

    def whole_chunk(self) -> int:
        """The layout word of a chunk with all its tokens."""
        metadata = self._metadata
        if metadata is None:
            return 0
        return layout_word(metadata.get_shapes(), metadata.get_dtypes(), format_of(metadata))


def format_of(metadata: LMCacheMetadata) -> MemoryFormat:
    """The format of the engine's chunks."""
    return MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
