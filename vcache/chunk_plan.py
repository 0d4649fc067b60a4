"""What a call of store or retrieve is about: its mask, slots and offset turned into whole chunks, each checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vcache.arguments import check_slot_range, checked_offset, checked_slots, masked_prefix
from vcache.slots import blocks_of_few_slots, blocks_of_slots

if TYPE_CHECKING:
    from vcache.arguments import Mask
    from vcache.keys import ChunkKey, ModelSpec
    from vcache.paged_kv import PagedKV


class ChunkPlan(NamedTuple):
    """Consecutive chunks of a prompt, and the blocks that hold or take them."""

    keys: Sequence[ChunkKey]
    parent: ChunkKey | None  # the key before the first
    block_ids: npt.NDArray[np.int64]  # [len(keys), blocks per chunk]
    skipped_tokens: int  # those before the first


def plan_chunks(
    model: ModelSpec,
    kv: PagedKV,
    keys: Sequence[ChunkKey],
    tokens: int,
    *,
    mask: Mask | None,
    slot_mapping: object,
    offset: int,
) -> ChunkPlan:
    """The chunks that ``mask`` leaves, of a prompt of so many ``tokens`` whose whole chunks are ``keys``.

    ``slot_mapping[i]`` is the slot of token ``offset + i``. Raises ``ValueError`` naming the argument that is wrong.
    """
    first_with_slot = checked_offset(offset, tokens=tokens)
    if mask is None:
        skipped = first_with_slot
        if skipped % model.chunk_size and skipped != tokens:
            raise ValueError(
                f"offset must be a multiple of {model.chunk_size} tokens (whole chunks) where no mask is given, got {offset}"
            )
    else:
        skipped = masked_prefix(mask, tokens=tokens, chunk_size=model.chunk_size)
        if first_with_slot > skipped:
            raise ValueError(f"offset is {offset}, but by the mask tokens from {skipped} on are to be stored")
    first = skipped - first_with_slot
    whole_before = skipped // model.chunk_size
    wanted = keys[whole_before:]
    length, end = tokens - first_with_slot, first + len(wanted) * model.chunk_size
    blocks = blocks_of_few_slots(slot_mapping, model.block_size, kv.num_blocks, length=length, first=first, end=end)
    if blocks is None:
        slots = checked_slots(slot_mapping, length=length, device=kv.device)
        check_slot_range(slots, first=first, slots=kv.num_blocks * model.block_size)
        blocks = blocks_of_slots(slots[:end], model.block_size, kv.num_blocks, first=first)
    return ChunkPlan(
        keys=wanted,
        parent=keys[whole_before - 1] if 0 < whole_before <= len(keys) else None,
        block_ids=blocks.reshape(len(wanted), model.blocks_per_chunk),
        skipped_tokens=skipped,
    )
