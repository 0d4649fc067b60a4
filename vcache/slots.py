"""Slots of tokens, as engines pass them, to the blocks they fill."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vcache.tokens import FEW


def blocks_of_few_slots(
    slot_mapping: object, block_size: int, num_blocks: int, *, length: int, first: int, end: int
) -> npt.NDArray[np.int64] | None:
    """As ``blocks_of_slots(slot_mapping[:end], …, first=first)``, for a few slots in host memory that are all as they should be.

    Those from ``end`` on are slots, too, but of no whole chunk. ``length``: how many there are to be. ``None``: the longer way is
    to be taken, which says what is wrong, if anything is.
    """
    if length > FEW or not first < end <= length:
        return None
    if isinstance(slot_mapping, torch.Tensor):
        is_fit = slot_mapping.is_cpu and slot_mapping.dtype in (torch.int64, torch.int32)
    else:
        is_fit = isinstance(slot_mapping, np.ndarray) and slot_mapping.dtype.kind in "iu"
    if not is_fit or slot_mapping.shape != (length,):  # type: ignore[attr-defined]
        return None
    slots: list[int] = slot_mapping.tolist()[first:]  # type: ignore[attr-defined]
    if min(slots) < 0 or max(slots) >= num_blocks * block_size:
        return None
    blocks = []
    for at in range(0, end - first, block_size):
        start = slots[at]
        if start % block_size or slots[at : at + block_size] != list(range(start, start + block_size)):
            return None
        blocks.append(start // block_size)
    return np.array(blocks, dtype=np.int64)


def blocks_of_slots(
    slot_mapping: torch.Tensor | npt.NDArray[np.int64], block_size: int, num_blocks: int, *, first: int = 0
) -> npt.NDArray[np.int64]:
    """The block of each ``block_size`` slots from index ``first`` on, int64 ``[(len(slot_mapping) - first) // block_size]``.

    Slot ``b * block_size + i`` holds token ``i`` of block ``b``. Only whole blocks can be moved, so the slots must be whole
    blocks in order. Raises ValueError that names ``slot_mapping`` and the first index that is padding (-1), out of range or
    not where its block needs it.
    """
    if isinstance(slot_mapping, torch.Tensor):
        slots = slot_mapping.detach().cpu().numpy() if not slot_mapping.dtype.is_floating_point else np.empty(0)
    else:
        slots = np.asarray(slot_mapping)
    if slots.dtype.kind not in "iu" or slots.ndim != 1:
        kind, shape = str(slot_mapping.dtype).removeprefix("torch."), tuple(slot_mapping.shape)
        raise ValueError(f"slot_mapping must be a 1-D tensor or array of integers, not {kind} of shape {shape}")
    slots = slots[first:]
    if len(slots) % block_size:
        raise ValueError(f"slot_mapping has {len(slots)} slots, not a multiple of the block size {block_size}")
    rows = slots.astype(np.int64, copy=False).reshape(-1, block_size)
    blocks = rows[:, 0] // block_size
    expected = blocks[:, None] * block_size + np.arange(block_size)
    if blocks.size and (int(blocks.view(np.uint64).max()) >= num_blocks or (rows != expected).any()):  # or negative
        index = int(np.flatnonzero((rows != expected) | (rows < 0) | (rows >= num_blocks * block_size))[0])
        slot = int(slots[index])
        if slot == -1:
            reason = "padding: pass only the slots of real tokens"
        elif not 0 <= slot < num_blocks * block_size:
            reason = f"out of range: {num_blocks} blocks of {block_size} are slots 0 to {num_blocks * block_size - 1}"
        else:
            reason = f"not block-aligned: slot {int(expected.flat[index])} belongs there (block size {block_size})"
        raise ValueError(f"slot_mapping[{first + index}] is {slot}, {reason}")
    return np.ascontiguousarray(blocks)
