"""Copies between planes and payloads in host memory, by a few threads that hold the GIL only between large operations.

One operation copies a run of neighbouring blocks in all planes of a field: a strided numpy assignment, in C a memcpy per
plane, with the GIL released. A thread's share is a range of block positions, whichever chunks they are in. torch's own threads
are not used: they wait for each other within every operation, which costs most of the speed as soon as the engine keeps a
core busy. docs/benchmarks/notes.md has the figures, and those of the ways not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch

from vcache.paged_kv import PagedKV
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_scatter
from vcache.transfer.threads import MAX_THREADS, default_threads, run_shares

Bytes = npt.NDArray[np.uint8]

#: A second thread is worth waking for this much: it takes about 30 us, in which the first copies 256 KiB.
MIN_SHARE_BYTES = 512 << 10


def gather(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int | None = None
) -> None:
    """Copy the blocks of each chunk into its payload; done when it returns.

    See ``vcache.transfer.gather``.
    """
    copy = check_gather(kv, block_ids, segment, offsets)

    def work(first: int, last: int) -> None:
        for in_planes, in_payload in _pairs(kv, copy, segment, first, last):
            in_payload[...] = in_planes

    _in_shares(work, copy, threads)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int | None = None
) -> None:
    """Copy each payload into the blocks of its chunk; done when it returns.

    See ``vcache.transfer.scatter``.
    """
    copy = check_scatter(kv, block_ids, segment, offsets)

    def work(first: int, last: int) -> None:
        for in_planes, in_payload in _pairs(kv, copy, segment, first, last):
            in_planes[...] = in_payload

    _in_shares(work, copy, threads)


def _in_shares(work: Callable[[int, int], None], copy: CheckedCopy, threads: int | None) -> None:
    positions = copy.block_ids.size
    if copy.nbytes == 0:
        return
    wanted = default_threads() if threads is None else min(threads, MAX_THREADS)
    count = max(1, min(wanted, positions, copy.nbytes // MIN_SHARE_BYTES))
    run_shares(work, [positions * share // count for share in range(count + 1)])


def _pairs(
    kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor, first: int, last: int
) -> Iterator[tuple[Bytes, Bytes]]:
    """The same bytes in the planes and in the payload, ``[planes, blocks, block_bytes]``, for positions first to last.

    A position counts blocks through all chunks; one pair is a run of neighbouring blocks of one chunk.
    """
    per_chunk = copy.block_ids.shape[1]
    ids = copy.block_ids.ravel()[first:last]
    in_chunk = np.arange(first, last) % per_chunk
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(ids) != 1) | (in_chunk[1:] == 0))))
    ends = np.append(starts[1:], len(ids))
    runs = np.stack(((starts + first) // per_chunk, in_chunk[starts], ids[starts], ends - starts), axis=1).tolist()
    everything: Bytes = segment.numpy()
    offsets = copy.offsets.tolist()
    for field in kv.fields:
        planes: Bytes = field.view.numpy()
        count, _, block_bytes = planes.shape
        nbytes = count * per_chunk * block_bytes
        for chunk, runs_of_chunk in groupby(runs, key=itemgetter(0)):
            start = offsets[chunk] + field.bytes_before * per_chunk
            payload = everything[start : start + nbytes].reshape(count, per_chunk, block_bytes)
            for _, position, block, length in runs_of_chunk:
                yield planes[:, block : block + length], payload[:, position : position + length]
