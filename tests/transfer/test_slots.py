"""Slots become blocks, or a ValueError that names the first slot that does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.slots import blocks_of_few_slots, blocks_of_slots


@settings(deadline=None)
@given(
    block_size=st.integers(1, 32),
    blocks=st.lists(st.integers(0, 99), max_size=20),
    kind=st.sampled_from([torch.int64, torch.int32, np.int64, np.int32]),
)
def test_whole_blocks_in_any_order(block_size: int, blocks: list[int], kind: Any) -> None:
    slots = [block * block_size + i for block in blocks for i in range(block_size)]
    mapping = torch.tensor(slots, dtype=kind) if isinstance(kind, torch.dtype) else np.array(slots, dtype=kind)
    found = blocks_of_slots(mapping, block_size, 100)
    assert found.dtype == np.int64
    assert found.tolist() == blocks
    few = blocks_of_few_slots(mapping, block_size, 100, length=len(slots), first=0, end=len(slots))
    assert (few is None) is (not blocks)
    assert few is None or (few.dtype == np.int64 and few.tolist() == blocks)


@given(
    slots=st.lists(st.integers(-2, 13), min_size=1, max_size=12)
    | st.lists(st.integers(0, 2), min_size=1, max_size=3).map(
        lambda b: [4 * block + i for block in b for i in range(4)]
    ),
    first=st.integers(0, 12),
    whole=st.integers(0, 3),
)
def test_what_is_taken_the_short_way_is_what_the_longer_one_finds(slots: list[int], first: int, whole: int) -> None:
    end = first + 4 * whole
    mapping = np.array(slots)
    few = blocks_of_few_slots(mapping, 4, 3, length=len(slots), first=first, end=end)
    if few is not None:
        assert all(0 <= slot < 12 for slot in slots[first:])
        assert few.tolist() == blocks_of_slots(mapping[:end], 4, 3, first=first).tolist()


BAD: dict[str, tuple[list[Any], str]] = {
    "padding": ([0, 1, 2, 3, 4, -1, -1, -1], r"slot_mapping\[5\] is -1, padding"),
    "below zero": ([-2, -1, 0, 1], r"slot_mapping\[0\] is -2, out of range"),
    "beyond the end": (
        [36, 37, 38, 39, 40, 41, 42, 43],
        r"slot_mapping\[4\] is 40, out of range: 10 blocks of 4 .* 0 to 39",
    ),
    "a block begun in the middle": ([2, 3, 4, 5], r"slot_mapping\[0\] is 2, not block-aligned: slot 0 belongs there"),
    "two slots exchanged": ([0, 1, 2, 3, 4, 6, 5, 7], r"slot_mapping\[5\] is 6, not block-aligned: slot 5 belongs"),
    "half a block": ([0, 1], "slot_mapping has 2 slots, not a multiple of the block size 4"),
    "floats": ([0.0, 1.0, 2.0, 3.0], "slot_mapping must be a 1-D tensor or array of integers, not float"),
    "booleans": ([True] * 4, "of integers, not bool"),
    "two axes": ([[0, 1, 2, 3]], r"of integers, not int64 of shape \(1, 4\)"),
}


@pytest.mark.parametrize("make", [torch.tensor, np.array])
@pytest.mark.parametrize("name", BAD)
def test_slots_that_are_not_whole_blocks_are_refused(name: str, make: Any) -> None:
    slots, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        blocks_of_slots(make(slots), 4, 10)
    if "half" not in name:
        assert blocks_of_few_slots(make(slots), 4, 10, length=len(make(slots)), first=0, end=len(make(slots))) is None


def test_no_slots_are_no_blocks() -> None:
    assert blocks_of_slots(torch.empty(0, dtype=torch.int64), 4, 10).tolist() == []
