"""LMCache's keys and objects as tests make them, and an L2 adapter driven as its controllers drive it."""

from __future__ import annotations

import hashlib
import select
from collections.abc import Sequence

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd
from vcache_lmcache import VCacheL2Adapter

from tests.lmcache.conftest import PATIENT
from tests.support.processes import PATIENCE_S

SHAPE = (2, 4, 16, 32)


def object_key(name: object, *, rank: int = 0, salt: str = "", group: int = 0, model: str = "model") -> ObjectKey:
    digest = hashlib.sha256(str(name).encode()).digest()
    return ObjectKey(chunk_hash=digest, model_name=model, kv_rank=rank, object_group_id=group, cache_salt=salt)


def memory_object(
    seed: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: Sequence[int] = SHAPE,
    fmt: MemoryFormat = MemoryFormat.KV_2LTD,
    raw: torch.dtype | None = None,
) -> TensorMemoryObj:
    """An object with seeded bytes (``None``: zeros), whose raw tensor has the dtype ``raw`` (default: its own)."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.zeros(nbytes, dtype=torch.uint8)
    if seed is not None:
        data = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    metadata = MemoryObjMetadata(shape=torch.Size(shape), dtype=dtype, address=0, phy_size=nbytes, ref_count=1, fmt=fmt)
    return TensorMemoryObj(data.view(raw or dtype), metadata, parent_allocator=None)


def content(obj: TensorMemoryObj) -> bytes:
    return bytes(obj.raw_data.view(torch.uint8).numpy().tobytes())


def open_adapter(**options: object) -> VCacheL2Adapter:
    return VCacheL2Adapter({**PATIENT, **options}, l1_memory_desc=None)


class Tasks:
    """Submits tasks and waits for their events, as LMCache's controllers do."""

    def __init__(self, adapter: VCacheL2Adapter) -> None:
        self.adapter = adapter

    def store(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> L2StoreResult:
        task = self.adapter.submit_store_task(keys, objects)
        _await(self.adapter.get_store_event_fd())
        done = self.adapter.pop_completed_store_tasks()
        assert set(done) == {task}
        return done[task]

    def lookup(self, keys: list[ObjectKey]) -> list[int]:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        _await(self.adapter.get_lookup_and_lock_event_fd())
        return _bits(self.adapter.query_lookup_and_lock_result(task), keys)

    def load(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> list[int]:
        task = self.adapter.submit_load_task(keys, objects)
        _await(self.adapter.get_load_event_fd())
        bits = _bits(self.adapter.query_load_result(task), keys)
        assert self.adapter.query_load_result(task) is None, "a result is answered once"
        return bits


def _await(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(PATIENCE_S * 1000), "no event came"
    consume_fd(fd)


def _bits(bitmap: Bitmap | None, keys: Sequence[ObjectKey]) -> list[int]:
    assert bitmap is not None
    return [int(bitmap.test(index)) for index in range(len(keys))]
