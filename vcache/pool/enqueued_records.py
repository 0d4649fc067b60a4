"""Records in VRAM that are marked, committed and validated in the order of a stream, by kernels: the host waits for none but the verdict.

For the copies that a kernel makes between an engine's planes and a segment. What such a kernel must not touch, because its record
could not be marked, is kept from it on the device. Other copies into or from VRAM use the words of the memory and wait for them
(``records.Directory``): those of donors, which load no kernels, and those in the background.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from vcache.memory.base import IndexArray, WordArray
from vcache.pool import record_kernels
from vcache.pool.record_kernels import COMMITTED, HELD, OF_LAYOUT, REFUSED
from vcache.pool.records import RECORD_BYTES, RECORD_WORDS
from vcache.transfer import cuda
from vcache.transfer.arguments import rooms_of
from vcache.transfer.events import on

if TYPE_CHECKING:
    from vcache.paged_kv import PagedKV
    from vcache.pool.segment import Segment

#: What ``prepare`` takes: enough for a few calls at a time, of some hundred chunks each.
ROOMS: Final = 8
ROOM_WORDS: Final = 16_384

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def prepare(kv: PagedKV) -> None:
    """Does ahead what the first reads and writes of these planes would do on the threads that make them.

    Compiles their kernels, which takes seconds where nobody has done so on this machine before, and takes pinned memory, for which CUDA
    may wait for the device.
    """
    with on(kv.device):
        _compile(kv.device)
        rooms = rooms_of(kv.device)
        for room in [rooms.take(ROOM_WORDS) for _ in range(ROOMS)]:
            room.done.record()  # behind what torch's allocator may have had its memory used for
            rooms.give_back(room)
    cuda.compile_for(kv)


@cache
def _compile(device: torch.device) -> None:
    """All at once for the current ``device``: a commit that compiles its kernel in the background keeps others waiting."""
    record_kernels.compile_all()


class _Enqueued:
    """What a call has enqueued, through a room of its own."""

    def __init__(self, device: torch.device, words: int) -> None:
        self._device = device
        self._rooms = rooms_of(device)
        with on(device):
            _compile(device)
            self._room = self._rooms.take(words)
        self._is_over = False

    def copied(self) -> None:
        """The copy has been enqueued, on what is the current stream now, or has failed there."""
        with on(self._device):
            self._room.done.record()

    def end(self) -> None:
        """Returns once nothing that was enqueued touches records or payloads any more. Harmless when called twice."""
        if not self._is_over:
            self._room.done.synchronize()
            self._is_over = True
            self._rooms.give_back(self._room)

    def _enqueue(self, launch: Callable[..., None], *arguments: torch.Tensor | int) -> None:
        """On the current stream, behind what was enqueued before on whichever."""
        done = self._room.done
        with on(self._device):
            done.wait()
            try:
                launch(*arguments)
            finally:
                done.record()


class EnqueuedWrite(_Enqueued):
    """The records of chunks that a kernel writes into one segment: ``mark``, the copy, ``copied``, ``commit``, ``outcome``, ``end``.

    All but the last two only enqueue, on the current stream of the planes' device; ``commit`` behind the copy, whatever the
    stream and the thread. Not thread-safe.
    """

    def __init__(self, segment: Segment, records: IndexArray, rows: WordArray, *, device: torch.device) -> None:
        """``rows``: ``[n, 16]``, as ``records.pack`` makes them. Nothing is enqueued yet."""
        count = self._count = len(records)
        addresses = _addresses(segment, records)
        super().__init__(device, count * (RECORD_WORDS + 2))
        self._arguments, self._verdicts = self._room.pinned, self._room.pinned[count * (RECORD_WORDS + 1) :]
        self._marked = self._room.on_device[:count]
        self._room.words[:count] = addresses
        self._room.words[count : count * (RECORD_WORDS + 1)] = rows.view(np.int64).ravel()

    def mark(self) -> torch.Tensor:
        """Marks the records that are free; int64 ``[n]`` on the device, 0 for the others: no byte of their payloads may be written."""
        self._enqueue(record_kernels.mark, self._arguments, self._marked, self._count)
        return self._marked

    def commit(self) -> None:
        """Commits those that are still this writer's."""
        self._enqueue(record_kernels.commit, self._arguments, self._marked, self._verdicts, self._count)

    def outcome(self) -> tuple[BoolArray, BoolArray]:
        """Which records were not free, and which are committed. Waits for ``commit``."""
        self._room.done.synchronize()
        verdicts = self._verdicts[: self._count].numpy()
        return verdicts == REFUSED, verdicts == COMMITTED


class EnqueuedRead(_Enqueued):
    """The records of chunks that a kernel reads from one segment: the copy, ``copied``, ``validate``, ``outcome``, ``end``.

    ``copied`` and ``validate`` only enqueue, as the calls of ``EnqueuedWrite`` do. Not thread-safe.
    """

    def __init__(
        self,
        segment: Segment,
        records: IndexArray,
        generations: WordArray,
        keys: WordArray,
        *,
        layout: int,
        device: torch.device,
    ) -> None:
        """``generations`` are even, ``keys`` ``[n, 2]``, ``layout`` what all should have. Nothing is enqueued yet."""
        count = self._count = len(records)
        addresses = _addresses(segment, records)
        super().__init__(device, count * 5 + 1)
        self._arguments, self._verdicts = self._room.pinned, self._room.pinned[4 * count + 1 :]
        words = self._room.words
        words[:count] = addresses
        words[count : 2 * count] = np.ascontiguousarray(generations).view(np.int64)
        words[2 * count : 4 * count] = np.ascontiguousarray(keys).view(np.int64).ravel()
        words[4 * count] = np.uint64(layout).view(np.int64)

    def validate(self) -> None:
        """Looks at the records, behind the copy."""
        self._enqueue(record_kernels.validate, self._arguments, self._verdicts, self._count)

    def outcome(self) -> tuple[BoolArray, BoolArray]:
        """Which records still held key and generation after the copy, and which have the layout. Waits for ``validate``."""
        self._room.done.synchronize()
        verdicts = self._verdicts[: self._count].numpy()
        return (verdicts & HELD) != 0, (verdicts & OF_LAYOUT) != 0


def _addresses(segment: Segment, records: IndexArray) -> Int64Array:
    if records.size and not 0 <= int(records.min()) <= int(records.max()) < segment.records:
        raise IndexError(f"records {records.tolist()}: the directory has {segment.records}")
    addresses: Int64Array = segment.directory_address + records * RECORD_BYTES
    return addresses
