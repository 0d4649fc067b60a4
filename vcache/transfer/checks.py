"""The checks every copy passes before its first byte moves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from vcache.paged_kv import PagedKV
from vcache.tokens import FEW

Int64Array = npt.NDArray[np.int64]
_INT64: Final = np.dtype(np.int64)


@dataclass(frozen=True, slots=True)
class CheckedCopy:
    """Block ids ``[chunks, blocks_per_chunk]`` and payload offsets ``[chunks]`` that fit their memory, contiguous int64."""

    block_ids: Int64Array
    offsets: Int64Array
    payload_bytes: int

    @property
    def nbytes(self) -> int:
        return self.payload_bytes * len(self.offsets)


def check_gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> CheckedCopy:
    """Check a copy of blocks into payloads. A block may be stored twice; payloads must not share bytes."""
    copy = _check(kv, block_ids, segment, offsets)
    for first, second in pairwise(sorted(copy.offsets.tolist())):
        if second - first < copy.payload_bytes:
            raise ValueError(f"offsets {first} and {second} are closer than a payload of {copy.payload_bytes} bytes")
    return copy


def check_scatter(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> CheckedCopy:
    """Check a copy of payloads into blocks. No block may be written twice; a payload may be read twice."""
    copy = _check(kv, block_ids, segment, offsets)
    if len(set(copy.block_ids.ravel().tolist())) < copy.block_ids.size:
        in_order = np.sort(copy.block_ids, axis=None)
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        raise ValueError(f"block_ids holds block {twice[0]} twice; a load writes each block once")
    return copy


def check_one_kind(kv: PagedKV, segment: torch.Tensor) -> None:
    """Check that one copy reaches both; ``staged.py`` is for what lies on devices of different kinds."""
    if segment.device.type != kv.device.type:
        raise ValueError(f"the segment is on {segment.device}, the planes on {kv.device}")


def _check(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array) -> CheckedCopy:
    ids = _int64("block_ids", block_ids, dimensions=2)
    starts = _int64("offsets", offsets, dimensions=1)
    if len(starts) != len(ids):
        raise ValueError(f"offsets has {len(starts)} entries for the {len(ids)} chunks of block_ids")
    if segment.dtype != torch.uint8 or segment.dim() != 1 or not segment.is_contiguous():
        raise ValueError(
            f"the segment must be a contiguous 1-D uint8 tensor, not {segment.dtype} {tuple(segment.shape)}"
        )
    bad = _first_outside(ids, kv.num_blocks)
    if bad is not None:
        raise ValueError(f"block_ids{list(bad)} is {ids[bad]}; there are blocks 0 to {kv.num_blocks - 1}")
    payload_bytes = kv.payload_bytes(ids.shape[1])
    bad = _first_outside(starts, segment.numel() - payload_bytes + 1)
    if bad is not None:
        raise ValueError(
            f"offsets{list(bad)} is {starts[bad]}; a payload of {payload_bytes} bytes there is not within the segment "
            f"of {segment.numel()} bytes"
        )
    return CheckedCopy(ids, starts, payload_bytes)


def _int64(name: str, values: Int64Array, *, dimensions: int) -> Int64Array:
    array = np.asarray(values)
    if array.dtype == _INT64 and array.ndim == dimensions and array.flags.c_contiguous:
        return array
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise ValueError(f"{name} must be a {dimensions}-D array of int64, not {array.ndim}-D {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _first_outside(values: Int64Array, limit: int) -> tuple[int, ...] | None:
    """The index of the first value that is not in ``[0, limit)``."""
    if values.size <= FEW:
        few = values.ravel().tolist()
        if not few or (min(few) >= 0 and max(few) < limit):
            return None
    elif int(values.view(np.uint64).max()) < limit:  # a negative one is very high, unsigned
        return None
    return tuple(int(i) for i in np.argwhere((values < 0) | (values >= limit))[0])
