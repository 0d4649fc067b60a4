"""Copies between planes and payloads by way of a small buffer on the planes' device.

A GPU's planes meet host memory in this way: segments of tier DRAM, and payloads that came from a store or from another host; and a
CPU's planes VRAM. Payloads on a peer GPU may take this way as well, by the copy engine (``ways.py``). For a GPU's planes all is
enqueued, piece by piece, on its current stream, whose order lets one buffer serve all pieces; it does not outlive the
call for this process, only for that stream: torch's allocator gives its memory to what is enqueued behind. CUDA itself waits
where host memory is not pinned. Serving engines leave little VRAM free, so the buffer is small, and smaller where not even that is
to be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import torch

from vcache.paged_kv import PagedKV
from vcache.transfer.checks import CheckedCopy, Int64Array

#: What a call takes of the planes' device, unless a single payload is larger.
BUFFER_BYTES: Final = 32 << 20

#: Gathers into, or scatters from, memory on the planes' device.
Direct = Callable[[PagedKV, Int64Array, torch.Tensor, Int64Array], None]


def gather(kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor, direct: Direct) -> None:
    """Copy blocks into payloads on a device of another kind; from planes on a GPU it is only enqueued, as far as it can be."""
    for piece in _pieces(kv, copy):
        direct(kv, piece.block_ids, piece.buffer, piece.starts)
        for offset, payload in zip(piece.offsets, piece.payloads, strict=True):
            segment[offset : offset + copy.payload_bytes].copy_(payload, non_blocking=payload.is_cuda)


def scatter(kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor, direct: Direct) -> None:
    """Copy payloads into blocks; to planes on a GPU it is only enqueued, as far as it can be."""
    for piece in _pieces(kv, copy):
        for offset, payload in zip(piece.offsets, piece.payloads, strict=True):
            payload.copy_(segment[offset : offset + copy.payload_bytes], non_blocking=payload.is_cuda)
        direct(kv, piece.block_ids, piece.buffer, piece.starts)


class _Piece(NamedTuple):
    """A few chunks, and the buffer that their payloads pass through."""

    block_ids: Int64Array
    offsets: list[int]  # in the segment
    starts: Int64Array  # in the buffer
    buffer: torch.Tensor
    payloads: list[torch.Tensor]  # those in the buffer


def _pieces(kv: PagedKV, copy: CheckedCopy) -> Iterator[_Piece]:
    if copy.nbytes == 0:
        return
    nbytes = copy.payload_bytes
    buffer = _buffer(kv.device, nbytes, count=len(copy.offsets))
    at_once = buffer.nbytes // nbytes
    for first in range(0, len(copy.offsets), at_once):
        offsets = copy.offsets[first : first + at_once].tolist()
        starts = np.arange(len(offsets), dtype=np.int64) * nbytes
        payloads = [buffer[start : start + nbytes] for start in starts.tolist()]
        yield _Piece(copy.block_ids[first : first + at_once], offsets, starts, buffer, payloads)


def _buffer(device: torch.device, nbytes: int, *, count: int) -> torch.Tensor:
    """Room for payloads of ``nbytes``: for ``count``, or as many of them as there is memory for.

    Raises ``torch.OutOfMemoryError`` when there is not even room for one.
    """
    count = min(count, max(1, BUFFER_BYTES // nbytes))
    while True:
        try:
            return torch.empty(count * nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            count //= 2
