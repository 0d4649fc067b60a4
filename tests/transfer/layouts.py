"""Random KV caches as engines lay them out, with a view of every plane that owes nothing to ``PagedKV``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from vcache.paged_kv import PagedKV


@dataclass(frozen=True)
class Layout:
    """How the caches of one engine lie in memory. Inner axes are given in memory order; ``order`` is how they are shown."""

    halves: bool
    stacked: bool
    layers: int
    num_blocks: int
    inner: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    block_gap: int  # elements between two blocks
    plane_gap: int  # elements between two planes
    shared_storage: bool
    as_dict: bool


@dataclass
class Caches:
    """What an engine would hold: its tensors, and all memory they lie in, gaps included, as ``memory``."""

    layout: Layout
    kv_caches: Any
    planes: list[torch.Tensor]  # uint8 [num_blocks, block_bytes] each
    memory: list[torch.Tensor]  # uint8

    def paged(self) -> PagedKV:
        hint = None
        if self.layout.stacked:
            hint = 2 if self.layout.halves else 1
        return PagedKV(self.kv_caches, block_size=self.layout.inner[0], block_axis=hint)

    def payload(self, block_ids: list[int]) -> torch.Tensor:
        """By definition: for each plane in order its blocks in order."""
        return torch.cat([plane[block].reshape(-1) for plane in self.planes for block in block_ids])

    def copy_of_memory(self) -> list[torch.Tensor]:
        return [memory.clone() for memory in self.memory]


def build(layout: Layout, seed: int, device: str = "cpu") -> Caches:
    """Caches full of random bytes, gaps too."""
    random = np.random.default_rng(seed)
    size = layout.dtype.itemsize
    block = prod(layout.inner)
    stride = block + layout.block_gap
    per_plane = layout.num_blocks * stride + layout.plane_gap
    halves = 2 if layout.halves else 1
    per_layer = halves * per_plane
    storages = 1 if layout.shared_storage or layout.stacked else layout.layers
    layers_each = layout.layers // storages
    memory = [_random_bytes(random, layers_each * per_layer * size, device) for _ in range(storages)]
    inner_strides = tuple(accumulate(reversed(layout.inner[1:]), mul, initial=1))[::-1]
    shown = tuple(layout.inner[i] for i in layout.order)
    shown_strides = tuple(inner_strides[i] for i in layout.order)
    lead: tuple[int, ...] = (layout.layers,) if layout.stacked else ()
    lead_strides: tuple[int, ...] = (per_layer,) if layout.stacked else ()
    if layout.halves:
        lead, lead_strides = (*lead, 2), (*lead_strides, per_plane)
    shape, strides = (*lead, layout.num_blocks, *shown), (*lead_strides, stride, *shown_strides)
    tensors = [
        memory[i // layers_each].view(layout.dtype).as_strided(shape, strides, i % layers_each * per_layer)
        for i in range(1 if layout.stacked else layout.layers)
    ]
    planes = [
        memory[i // layers_each].as_strided(
            (layout.num_blocks, block * size),
            (stride * size, 1),
            (i % layers_each * per_layer + half * per_plane) * size,
        )
        for i in range(layout.layers)
        for half in range(halves)
    ]
    kv_caches: Any = tensors
    if layout.stacked:
        kv_caches = tensors[0]
    elif layout.as_dict:
        kv_caches = {f"model.layers.{i}.attn": tensor for i, tensor in enumerate(tensors)}
    return Caches(layout, kv_caches, planes, memory)


def _random_bytes(random: np.random.Generator, count: int, device: str) -> torch.Tensor:
    return torch.from_numpy(random.integers(0, 256, count, dtype=np.uint8)).to(device)


def _inner(halves: bool) -> st.SearchStrategy[tuple[int, ...]]:
    """``[block_size, heads, dim]``, without heads as MLA has it where there are no halves."""
    block_size = st.sampled_from([1, 2, 4, 8])
    dim = st.integers(1, 33)
    with_heads = st.tuples(block_size, st.integers(1, 3), dim)
    return with_heads if halves else with_heads | st.tuples(block_size, dim)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    halves = draw(st.booleans())
    inner = draw(_inner(halves))
    return Layout(
        halves=halves,
        stacked=draw(st.booleans()),
        layers=draw(st.integers(1, 4)),
        num_blocks=draw(st.integers(3, 12)),
        inner=inner,
        order=tuple(draw(st.permutations(range(len(inner))))),
        dtype=draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64])),
        block_gap=draw(st.sampled_from([0, 0, 1, 5])),
        plane_gap=draw(st.sampled_from([0, 0, 3])),
        shared_storage=draw(st.booleans()),
        as_dict=draw(st.booleans()),
    )


@st.composite
def chunks_of(draw: st.DrawFn, num_blocks: int) -> list[list[int]]:
    """Chunks of different blocks: neighbours, neighbours in part, or scattered."""
    per_chunk = draw(st.integers(1, num_blocks))
    count = draw(st.integers(1, num_blocks // per_chunk))
    blocks = list(range(num_blocks))
    for _ in range(draw(st.integers(0, 3))):  # turn the cards over a few times: runs of neighbours stay
        cut = draw(st.integers(0, num_blocks - 1))
        blocks = blocks[cut:] + blocks[:cut][::-1]
    if draw(st.booleans()):
        blocks = list(draw(st.permutations(blocks)))
    return [blocks[i * per_chunk : (i + 1) * per_chunk] for i in range(count)]


@st.composite
def offsets_for(draw: st.DrawFn, count: int, payload_bytes: int, align: int = 1) -> tuple[list[int], int]:
    """Where ``count`` payloads begin, in any order with gaps between them, and the bytes of a segment that holds them."""
    gaps = draw(st.lists(st.integers(0, 9), min_size=count + 1, max_size=count + 1))
    offsets, at = [], 0
    for gap in gaps[:-1]:
        at += gap * align
        offsets.append(at)
        at += -(-payload_bytes // align) * align
    return list(draw(st.permutations(offsets))), at + gaps[-1] * align
