"""VCacheL2Adapter: the pool as an L2 of LMCache's MP mode (``lmcache server --l2-adapter '{"type": "plugin", ...}'``).

Stores, lookups and loads have a thread each, so that none waits for another; a task's result is there before its event. What
fails is a task without hits, a counter and a line in the log. Not here: the pool (``object_pool.py``), keys, locks.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface, L2TaskId
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from vcache.keys import tenant_of
from vcache.protocol import Outcome
from vcache_lmcache.held_keys import HeldKeys
from vcache_lmcache.keys import KeyMaker, flat_bytes, layout_of
from vcache_lmcache.known_objects import KnownObjects
from vcache_lmcache.object_pool import NewObject, ObjectPool
from vcache_lmcache.options import LMCacheOptions

logger: Final = logging.getLogger(__name__)


class VCacheL2Adapter(L2AdapterInterface):
    """Made by LMCache from ``adapter_params`` (``LMCacheOptions``); bad ones raise ``ConfigError``, and the server ends.

    A lock is a lease: it ends by ``submit_unlock``, or after ``server.max_lease``. Eviction is the pool's, so the capacity is not
    declared to LMCache; its own eviction policies may delete all the same.
    """

    def __init__(self, adapter_params: dict[str, Any], **_unused: object) -> None:
        super().__init__()
        options = LMCacheOptions.of(adapter_params, where="adapter_params")
        self._pool = ObjectPool(options, role="lmcache l2")
        self._keys = KeyMaker(options.namespace)
        self._locks = HeldKeys(self._pool.release)
        self._known = KnownObjects()
        self._ids = itertools.count()
        self._stored: dict[L2TaskId, L2StoreResult] = {}
        self._found: dict[L2TaskId, Bitmap] = {}
        self._loaded: dict[L2TaskId, Bitmap] = {}
        self._store_event = create_event_notifier()
        self._lookup_event = create_event_notifier()
        self._load_event = create_event_notifier()
        self._storing, self._looking_up, self._loading = (
            ThreadPoolExecutor(1, thread_name_prefix=f"vcache-l2-{what}") for what in ("store", "lookup", "load")
        )

    # --- events ---------------------------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        return int(self._store_event.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._lookup_event.fileno())

    def get_load_event_fd(self) -> int:
        return int(self._load_event.fileno())

    # --- store ----------------------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        return self._submit(
            self._storing,
            self._stored,
            self._store_event,
            lambda: self._store(keys, objects),
            otherwise=L2StoreResult(False, 0),
        )

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        done: dict[L2TaskId, L2StoreResult] = {}
        while self._stored:  # one by one: another thread adds to it
            task, result = self._stored.popitem()
            done[task] = result
        return done

    def _store(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> L2StoreResult:
        """Success: everything is in the pool now, by this call or another's."""
        news = [
            NewObject(
                key=chunk_key,
                data=flat_bytes(obj),
                layout=layout_of(obj),
                tokens=0,
                tenant=tenant_of(key.cache_salt),
            )
            for key, chunk_key, obj in zip(keys, self._keys.of_objects(keys), objects, strict=True)
        ]
        outcomes = self._pool.store(news, chained=False)  # nothing says which of them follows which
        sizes = {
            key: new.data.numel()
            for key, new, outcome in zip(keys, news, outcomes, strict=True)
            if outcome is Outcome.GRANTED
        }
        if sizes:
            forgotten = self._known.add(sizes)
            if forgotten:
                self._notify_keys_deleted(list(forgotten), list(forgotten.values()))
            self._notify_keys_stored(list(sizes), list(sizes.values()))
        is_there = all(outcome in (Outcome.GRANTED, Outcome.EXISTS) for outcome in outcomes)
        return L2StoreResult(is_there, sum(sizes.values()))

    # --- lookup and lock ------------------------------------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> L2TaskId:
        return self._submit(
            self._looking_up, self._found, self._lookup_event, lambda: self._look_up(keys), otherwise=Bitmap(len(keys))
        )

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._looking_up.submit(lambda: self._locks.let_go(self._keys.of_objects(keys)))  # after the lookup that locked

    # --- load -----------------------------------------------------------------------------------------------------

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        return self._submit(
            self._loading,
            self._loaded,
            self._load_event,
            lambda: self._load(keys, objects),
            otherwise=Bitmap(len(keys)),
        )

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        return self._loaded.pop(task_id, None)

    def _load(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> Bitmap:
        layouts = [layout_of(obj) for obj in objects]

        def target_of(index: int, nbytes: int, layout: int) -> torch.Tensor | None:
            obj = objects[index]
            if layout != layouts[index] or nbytes > obj.get_size():
                return None
            if nbytes < obj.get_size():  # it was stored narrowed, as LMCache's serde does
                obj.set_used_size(nbytes)
            return flat_bytes(obj)

        loaded = self._pool.load(self._keys.of_objects(keys), layouts, target_of)
        bitmap = _bitmap(loaded)
        accessed = [key for key, is_loaded in zip(keys, loaded, strict=True) if is_loaded]
        if accessed:
            self._notify_keys_accessed(accessed)
        return bitmap

    # --- eviction and listing -------------------------------------------------------------------------------------

    def delete(self, keys: list[ObjectKey]) -> None:
        """Returns once they are gone from memory; what the server could not confirm in time stays known."""
        if self._pool.remove(self._keys.of_objects(keys)) is not None:
            self._forget(keys)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Objects that this adapter stored, oldest first. What the pool evicted is listed until a lookup misses it."""
        if page_size <= 0:
            raise ValueError(f"page_size = {page_size}: must be positive")
        if cursor is not None and not cursor.isdecimal():
            raise ValueError(f"cursor = {cursor!r}: not one of this adapter's")
        entries, last = self._known.page(model_name, page_size, int(cursor or 0))
        return KeyListPage(entries=tuple(entries), next_page_token=str(last) if last else None)

    def get_usage(self) -> AdapterUsage:
        """The pool's bytes, whoever stored them; by salt, those that this adapter stored."""
        stats = self._pool.stats()
        mine = super().get_usage()
        if stats is None:
            return mine
        return AdapterUsage(
            total_bytes_used=sum(segment.used_bytes for segment in stats.segments),
            total_capacity_bytes=sum(segment.total_bytes for segment in stats.segments),
            bytes_by_cache_salt=mine.bytes_by_cache_salt,
        )

    def report_status(self) -> dict[str, Any]:
        """``is_healthy``: whether the metadata server answers. The counters are those of ``vcache.pool.client``."""
        return {
            "is_healthy": self._pool.client.available,
            "type": type(self).__name__,
            "endpoint": self._pool.config.endpoint,
            "known_objects": len(self._known),
            "locked_keys": len(self._locks),
            "failures": self._pool.failures.total,
            **self._pool.client.counters,
        }

    def close(self) -> None:
        """Ends once no task touches LMCache's memory any more."""
        for executor in (self._storing, self._looking_up, self._loading):
            executor.shutdown(wait=True)
        self._locks.let_go_all()
        self._pool.close()
        for event in (self._store_event, self._lookup_event, self._load_event):
            event.close()

    # --- beneath --------------------------------------------------------------------------------------------------

    def _look_up(self, keys: Sequence[ObjectKey]) -> Bitmap:
        """Which of them are there, each by itself, locked. One call."""
        chunk_keys = self._keys.of_objects(keys)
        found, leased = self._pool.locate(chunk_keys)
        for part, lease in leased:
            self._locks.hold(part, lease, self._pool.lock_s)
        if self._pool.client.available:
            self._forget([key for key, is_there in zip(keys, found, strict=True) if not is_there])
        return _bitmap(found)

    def _forget(self, keys: Sequence[ObjectKey]) -> None:
        sizes = self._known.forget(keys)
        if sizes:
            self._notify_keys_deleted(list(sizes), list(sizes.values()))

    def _submit(
        self,
        executor: ThreadPoolExecutor,
        results: dict[L2TaskId, Any],
        event: Any,
        work: Callable[[], Any],
        *,
        otherwise: Any,
    ) -> L2TaskId:
        task = next(self._ids)

        def run() -> None:
            result = otherwise
            with self._pool.failures.contained("l2 task"):
                result = work()
            results[task] = result
            event.notify()

        executor.submit(run)
        return task


def _bitmap(bits: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for index, bit in enumerate(bits):
        if bit:
            bitmap.set(index)
    return bitmap
