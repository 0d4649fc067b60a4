"""The engine's KV tensors seen as planes of opaque blocks.

A plane is ``[num_blocks, block_bytes]``: one layer, or its K or V half.

Not here: which block holds which token (``slots.py``), moving bytes (``transfer/``). What is inside a block is nobody's
business: on some backends it is packed (K transposed), so blocks move whole.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
import torch

from vcache.block_axis import KVCaches, KVExpectation, NamedTensor, block_axes, named_tensors

__all__ = ["KVCaches", "KVExpectation", "PagedKV", "Plane"]


@dataclass(frozen=True, slots=True)
class Plane:
    """One engine tensor, or a part of one: block ``b`` is ``block_bytes`` at ``address + b * stride_bytes``."""

    name: str
    address: int
    stride_bytes: int
    block_bytes: int


class PagedKV:
    """The KV tensors of one engine rank, mapped for copies of whole blocks.

    Takes a dict or list of per-layer tensors (or of tuples of them: K, V), or one tensor. Each is block first
    ``[num_blocks, ...]`` or in halves ``[2, num_blocks, ...]``; a single tensor may also be a stack of layers
    ``[layers, num_blocks, ...]`` or ``[layers, 2, num_blocks, ...]`` where ``block_axis``, ``num_blocks`` or
    ``expect.num_layers`` says so. A shape that can be read in two ways is refused until a hint settles it. The bytes
    *inside* a block must be dense, in any order of axes; blocks and planes may lie anywhere.

    Keeps the tensors' storages alive; does not notice when the engine moves its cache elsewhere. Raises ValueError that
    names the tensor (``argument``: what the caller calls them) and the reason where one cannot be mapped or contradicts
    ``expect``.
    """

    def __init__(
        self,
        kv_caches: KVCaches,
        *,
        block_size: int,
        num_blocks: int | None = None,
        block_axis: int | None = None,
        expect: KVExpectation | None = None,
        argument: str = "kv_caches",
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, not {block_size}")
        expect = expect or KVExpectation()
        named = named_tensors(kv_caches, expect, argument=argument)
        axes = block_axes(named, block_size=block_size, num_blocks=num_blocks, block_axis=block_axis, expect=expect)
        self.block_size = block_size
        self.device: torch.device = named[0].tensor.device
        self.num_blocks: int = named[0].shape[axes[0]]
        #: In the order of a payload.
        self.planes: tuple[Plane, ...] = tuple(
            plane for item, axis in zip(named, axes, strict=True) for plane in _planes(item, axis)
        )
        _check_disjoint(self.planes, self.num_blocks)
        #: Bytes of one block, summed over the planes.
        self.block_bytes: int = sum(plane.block_bytes for plane in self.planes)
        #: The planes as a copy takes them: int64 ``[planes, 4]`` of address, stride, block bytes, and where the plane begins
        #: in a payload, divided by the payload's number of blocks.
        self.table: bytes = _table(self.planes)
        self._storages = [item.tensor.untyped_storage() for item in named]  # kept alive, unlike the tensors
        #: What determines the order of bytes in a payload, independent of addresses and ``num_blocks``. Two caches may
        #: share payloads only if theirs are equal, so it belongs in the model's fingerprint.
        self.layout: str = _layout(named, axes)
        #: 64 bits of it, never 0: stands in every record, so that caches of equal models but other tensors share nothing.
        self.payload_layout: int = _payload_layout(self.layout)

    def payload_bytes(self, blocks_per_chunk: int) -> int:
        """Bytes of a payload of so many blocks."""
        return self.block_bytes * blocks_per_chunk

    def without_memory(self) -> PagedKV:
        """The same mapping with nothing to copy from or to: arguments can be checked against it, no tensor is kept alive."""
        mapping = copy.copy(self)
        mapping.table, mapping._storages = b"", []
        return mapping

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{len(self.planes)} planes on {self.device}, {self.num_blocks} blocks of "
            f"{self.block_size} tokens and {self.block_bytes} bytes in all, layout {self.layout}"
        )


def _planes(item: NamedTensor, axis: int) -> list[Plane]:
    """The planes of one tensor: one for each index before the block axis, or one in all where those lie inside a block."""
    tensor, shape, strides = item.tensor, item.shape, item.tensor.stride()
    size = tensor.element_size()
    if _is_dense(shape[axis + 1 :], strides[axis + 1 :]):
        leading, leading_strides = shape[:axis], strides[:axis]
    elif _is_dense(shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :]):
        leading, leading_strides = (), ()  # K and V interleaved inside the block
    else:
        raise ValueError(
            f"{item.name}: the inside of a block is not contiguous (shape {shape}, strides {strides}, blocks along axis {axis})"
        )
    count = 1
    for length in leading:
        count *= length
    block_bytes = item.block_bytes(axis) // count
    stride_bytes = strides[axis] * size if shape[axis] > 1 else block_bytes
    if stride_bytes < block_bytes:
        raise ValueError(
            f"{item.name}: blocks of {block_bytes} bytes lie {stride_bytes} bytes apart and overlap "
            f"(shape {shape}, strides {strides}, blocks along axis {axis})"
        )
    planes = []
    for index in product(*(range(length) for length in leading)):
        offset = sum(i * stride for i, stride in zip(index, leading_strides, strict=True)) * size
        name = item.name + "".join(f"[{i}]" for i in index)
        planes.append(Plane(name, tensor.data_ptr() + offset, stride_bytes, block_bytes))
    return planes


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these axes cover a gapless stretch of memory, in whatever order."""
    expected = 1
    for stride, length in sorted((stride, length) for length, stride in zip(sizes, strides, strict=True) if length > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _check_disjoint(planes: Sequence[Plane], num_blocks: int) -> None:
    """Refuse planes that share bytes: a load into one would spoil the other."""
    by_address = sorted(planes, key=lambda plane: plane.address)
    for _, group in groupby(_clustered(by_address, num_blocks), key=lambda pair: pair[0]):
        together = [plane for _, plane in group]
        if len(together) > 1:
            _check_interleaved(together, num_blocks)


def _clustered(by_address: Sequence[Plane], num_blocks: int) -> Iterator[tuple[int, Plane]]:
    """Number the planes so that those whose address ranges touch have the same number."""
    number, end = 0, 0
    for plane in by_address:
        number += plane.address >= end
        end = max(end, plane.address + (num_blocks - 1) * plane.stride_bytes + plane.block_bytes)
        yield number, plane


def _check_interleaved(planes: Sequence[Plane], num_blocks: int) -> None:
    blocks = np.arange(num_blocks, dtype=np.int64)
    starts = np.stack([plane.address + blocks * plane.stride_bytes for plane in planes])
    lengths = np.repeat([plane.block_bytes for plane in planes], num_blocks)
    order = np.argsort(starts, axis=None, kind="stable")
    starts_sorted = starts.ravel()[order]
    clash = np.flatnonzero(starts_sorted[:-1] + lengths[order][:-1] > starts_sorted[1:])
    if clash.size:
        first, second = (planes[int(i) // num_blocks].name for i in order[clash[0] : clash[0] + 2])
        raise ValueError(f"{first} shares bytes with {second}: pass each tensor once")


def _table(planes: Sequence[Plane]) -> bytes:
    rows = [(plane.address, plane.stride_bytes, plane.block_bytes) for plane in planes]
    before = np.cumsum([0, *(plane.block_bytes for plane in planes)])[:-1]
    return np.column_stack([np.array(rows, dtype=np.int64), before]).tobytes()


def _payload_layout(layout: str) -> int:
    return int.from_bytes(hashlib.sha256(b"vcache/payload-layout/2" + layout.encode()).digest()[:8], "little") or 1


def _layout(named: Sequence[NamedTensor], axes: Sequence[int]) -> str:
    """Per tensor: dtype, shape with ``n`` for the block axis, and the axes' order in memory; repeats are counted."""
    texts = []
    for item, axis in zip(named, axes, strict=True):
        dims = ",".join("n" if i == axis else str(length) for i, length in enumerate(item.shape))
        inner = [(-stride, i) for i, stride in enumerate(item.tensor.stride()) if i != axis and item.shape[i] > 1]
        order = "".join(str(i) for _, i in sorted(inner))
        texts.append(f"{str(item.tensor.dtype).removeprefix('torch.')}[{dims}]@{order}")
    return " ".join(f"{len(list(group))}x{text}" for text, group in groupby(texts))
