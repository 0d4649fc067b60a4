"""Staging memory: where bytes wait between a store and the pool, owned by whoever may still touch it.

A call to a store can outlive its caller's patience, and then still writes into the buffer it was given. So no caller's
buffer is ever given to a store: calls use blocks of this arena, and a block returns to it only once everybody who held the
block has let go, the late call included. Time alone frees nothing.

The arena is one piece of shared memory (a memfd), so that a helper process can map and register it once, and it is backed
by pages from the start (a sparse page would be a SIGBUS when memory runs out).
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import insort
from collections.abc import Sequence
from typing import Final

import torch

from vcache.errors import CapacityError
from vcache.store.objects import PAGE_BYTES
from vcache.units import format_size


class Block:
    """A page for an object's header and, right behind it, room for its payload. Counted: taken with one hold on it."""

    def __init__(self, staging: Staging, offset: int, nbytes: int) -> None:
        self.offset: Final = offset
        self.nbytes: Final = nbytes  # of the payload
        #: uint8 [PAGE_BYTES]; valid while the block is held.
        self.page: Final = staging.tensor[offset : offset + PAGE_BYTES]
        #: uint8 [nbytes], the payload; valid while the block is held.
        self.payload_offset: Final = offset + PAGE_BYTES
        self.tensor: Final = staging.tensor[self.payload_offset : self.payload_offset + nbytes]
        self._staging = staging
        self._holds = 1

    def hold(self) -> None:
        """One more party that must ``release`` before the memory is used for anything else."""
        with self._staging.lock:
            if self._holds == 0:
                raise ValueError("the block was already given back")
            self._holds += 1

    def release(self) -> None:
        """Ends one hold; with the last one the memory goes back to the arena."""
        with self._staging.lock:
            if self._holds == 0:
                raise ValueError("the block was already given back")
            self._holds -= 1
            if self._holds == 0:
                self._staging._give_back(self)


class Staging:
    """A bounded arena of blocks. Thread-safe."""

    def __init__(self, nbytes: int, *, setting: str = "store.staging_size") -> None:
        """Raises ``CapacityError``, naming the setting, when the machine has not that much memory to give."""
        self.nbytes: Final = _pages(nbytes)
        self.fd: Final = os.memfd_create("vcache-staging", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, self.nbytes)
            self._map = mmap.mmap(self.fd, self.nbytes)
        except OSError as error:
            os.close(self.fd)
            raise CapacityError(
                f"{setting} = {format_size(nbytes)}: no such memory to be had ({error.strerror})"
            ) from error
        #: The whole arena as uint8; its address stays valid until ``close``.
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            self.tensor: Final = torch.frombuffer(self._map, dtype=torch.uint8)
        self._address = self.tensor.data_ptr()
        self.lock: Final = threading.Condition()
        self._free = [(0, self.nbytes)]  # (offset, nbytes), in order of offset, never two that touch
        self._taken: dict[int, Block] = {}
        self._closed = False

    @property
    def free_bytes(self) -> int:
        with self.lock:
            return sum(nbytes for _, nbytes in self._free)

    def take(self, sizes: Sequence[int], *, wait_s: float = 0.0) -> list[Block]:
        """Blocks for payloads of ``sizes``: for as many of them, from the first on, as there is room.

        ``wait_s``: how long to wait for room for the first, if there is none now.
        """
        blocks: list[Block] = []
        with self.lock:
            if sizes and wait_s:
                self.lock.wait_for(lambda: self._closed or self._has_room(sizes[0]), wait_s)
            for nbytes in sizes:
                offset = None if self._closed else self._carve(PAGE_BYTES + _pages(nbytes))
                if offset is None:
                    break
                block = Block(self, offset, nbytes)
                self._taken[self._address + offset] = block
                blocks.append(block)
        return blocks

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        """The block whose whole payload ``tensor`` is, or ``None``: some other memory."""
        with self.lock:
            block = self._taken.get(tensor.data_ptr() - PAGE_BYTES)
        return block if block is not None and block.nbytes == tensor.nbytes else None

    def close(self) -> bool:
        """No more blocks; whether none is held any more. Memory goes once nothing looks into it, held blocks included."""
        with self.lock:
            already, self._closed = self._closed, True
            if not already:
                os.close(self.fd)
            return not self._taken  # the mapping itself goes with the last tensor that looks into it

    def check_integrity(self) -> None:
        """For tests: what is free and what is taken add up to the arena, without overlap or gap."""
        with self.lock:
            held = [(block.offset, PAGE_BYTES + _pages(block.nbytes)) for block in self._taken.values()]
            end = 0
            for offset, nbytes in sorted([*self._free, *held]):
                assert offset == end, f"{'gap' if offset > end else 'overlap'} at {end}"
                end = offset + nbytes
            assert end == self.nbytes
            assert all(first + size < second for (first, size), (second, _) in zip(self._free, self._free[1:]))  # noqa: B905

    def _has_room(self, nbytes: int) -> bool:
        return any(available >= PAGE_BYTES + _pages(nbytes) for _, available in self._free)

    def _carve(self, nbytes: int) -> int | None:
        for index, (offset, available) in enumerate(self._free):
            if available >= nbytes:
                rest = (offset + nbytes, available - nbytes)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return offset
        return None

    def _give_back(self, block: Block) -> None:
        del self._taken[self._address + block.offset]
        self.lock.notify_all()
        extent = (block.offset, PAGE_BYTES + _pages(block.nbytes))
        insort(self._free, extent)
        index = self._free.index(extent)
        if index + 1 < len(self._free) and extent[0] + extent[1] == self._free[index + 1][0]:
            extent = (extent[0], extent[1] + self._free.pop(index + 1)[1])
            self._free[index] = extent
        if index and sum(self._free[index - 1]) == extent[0]:
            self._free[index - 1 : index + 1] = [(self._free[index - 1][0], self._free[index - 1][1] + extent[1])]


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
