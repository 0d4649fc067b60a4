"""LMCache's memory objects in this process's own segment: where a chunk is computed into, and where one is read from.

An object is *new* (an extent that nobody else finds), *put* (on its way into the pool, or there; its extent is nobody else's until
its last reference goes) or *held* (a chunk of the pool that is read where it lies, until its last reference goes).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.utils import get_size_bytes
from lmcache.v1.memory_management import (
    MemoryAllocatorInterface,
    MemoryFormat,
    MemoryObj,
    MemoryObjMetadata,
    TensorMemoryObj,
)

from vcache.errors import CapacityError
from vcache.memory.base import is_host
from vcache.pool.donor import Donor
from vcache.pool.own_space import Extent, OwnSpace
from vcache_lmcache.object_pool import Held


class SegmentObject(TensorMemoryObj):
    """``extent``: what it was allocated; ``record``: what it holds; a put one has both."""

    def __init__(
        self,
        raw_data: torch.Tensor,
        metadata: MemoryObjMetadata,
        allocator: SegmentAllocator,
        *,
        extent: Extent | None = None,
        record: int = -1,
    ) -> None:
        super().__init__(raw_data, metadata, allocator)
        self.extent = extent
        self.record = record
        self.is_lost: bool | None = None  # of a put one: it is not in the pool; None: it is on its way


class SegmentAllocator(MemoryAllocatorInterface):
    """Thread-safe. Objects come from ``allocate`` or ``hold``, and end by ``ref_count_down``."""

    def __init__(self, donor: Donor, space: OwnSpace) -> None:
        self._donor = donor
        self._space = space
        self._lock = threading.Lock()
        with torch.inference_mode(False):  # an object made in that mode could not be written to outside it
            self._bytes = donor.segment.tensor
        self._is_pinned = False
        if is_host(donor.segment.memory.device) and torch.cuda.is_available():
            self._pin()

    def close(self) -> None:
        """No object may be in use any more."""
        if self._is_pinned:
            self._is_pinned = False
            _cudart().cudaHostUnregister(self._bytes.data_ptr())

    def allocate(
        self,
        shapes: torch.Size | list[torch.Size],
        dtypes: torch.dtype | list[torch.dtype],
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        allocator_type: str | None = None,
    ) -> SegmentObject | None:
        all_shapes, all_dtypes = self._adapt_shapes_and_dtypes(shapes, dtypes)
        extent = self._space.take(get_size_bytes(all_shapes, all_dtypes))
        if extent is None:
            return None
        return self._object(extent.offset, extent.nbytes, all_shapes, all_dtypes, fmt, extent=extent)

    def batched_allocate(
        self,
        shapes: torch.Size | list[torch.Size],
        dtypes: torch.dtype | list[torch.dtype],
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        allocator_type: str | None = None,
    ) -> list[SegmentObject] | None:
        """All of them, or none."""
        objs: list[SegmentObject] = []
        for _ in range(batch_size):
            obj = self.allocate(shapes, dtypes, fmt)
            if obj is None:
                self.batched_free(objs)
                return None
            objs.append(obj)
        return objs

    def hold(self, held: Held, shapes: list[torch.Size], dtypes: list[torch.dtype], fmt: MemoryFormat) -> SegmentObject:
        """Takes over a hold. The object is to be read only."""
        return self._object(held.offset, held.nbytes, shapes, dtypes, fmt, record=held.record)

    def free(self, memory_obj: MemoryObj, allocator_type: str | None = None) -> None:
        """By LMCache, when the last reference goes."""
        assert isinstance(memory_obj, SegmentObject)
        if not memory_obj.is_valid():
            return
        with self._lock:
            memory_obj.invalidate()
            is_lost = memory_obj.is_lost
        if memory_obj.record >= 0:
            self._donor.holds.release(memory_obj.record)
            if is_lost and memory_obj.extent is not None:
                self._space.give_up([memory_obj.extent])
        elif memory_obj.extent is not None:
            self._space.give_back([memory_obj.extent])

    def begin_put(self, objs: Sequence[SegmentObject]) -> bool:
        """From here on nobody writes to them, and their bytes stay while they are referenced; false: they cannot be put now."""
        holds = self._donor.holds
        for at, obj in enumerate(objs):
            assert obj.extent is not None
            if not holds.take(obj.extent.record):
                for taken in objs[:at]:
                    holds.release(taken.record)
                    taken.record = -1
                return False
            obj.record = obj.extent.record
        self._donor.segment.fence()  # what this thread has copied into them
        return True

    def end_put(self, obj: SegmentObject, *, is_stored: bool) -> None:
        """What became of it. Space without a chunk is given up when nobody refers to it any more."""
        with self._lock:
            obj.is_lost = not is_stored
            is_let_go = not obj.is_valid()
        if is_let_go and not is_stored and obj.extent is not None:
            self._space.give_up([obj.extent])

    def batched_free(
        self, memory_objs: Sequence[MemoryObj], allocator_type: str | None = None, update_stats: bool = True
    ) -> None:
        for obj in memory_objs:
            self.free(obj)

    def _pin(self) -> None:
        """LMCache's kernels on GPUs read and write host memory directly. Raises ``CapacityError`` where that cannot be had."""
        code = _cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)
        if int(code):
            raise CapacityError(
                f"CUDA cannot page-lock the segment of {self._bytes.numel()} bytes (error {int(code)}); use a smaller donate, "
                "or raise the limit of locked memory"
            )
        self._is_pinned = True

    def _object(
        self,
        offset: int,
        nbytes: int,
        shapes: list[torch.Size],
        dtypes: list[torch.dtype],
        fmt: MemoryFormat,
        *,
        extent: Extent | None = None,
        record: int = -1,
    ) -> SegmentObject:
        metadata = MemoryObjMetadata(shapes[0], dtypes[0], offset, nbytes, 1, 0, fmt, shapes=shapes, dtypes=dtypes)
        return SegmentObject(self._bytes[offset : offset + nbytes], metadata, self, extent=extent, record=record)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
