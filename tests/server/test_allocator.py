"""The extent allocator: best fit, merging, and how full it gets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram_metadata_server.allocator import ALIGNMENT, ExtentAllocator, OverlapError

MIB = 1 << 20


def test_the_smallest_hole_that_fits_is_taken() -> None:
    space = ExtentAllocator(0, 100 * ALIGNMENT)
    taken = [space.allocate(ALIGNMENT * size) for size in (10, 1, 4, 1, 6, 1)]
    for at, size in ((0, 10), (2, 4), (4, 6)):
        offset = taken[at]
        assert offset is not None
        space.free(offset, ALIGNMENT * size)
    assert space.allocate(3 * ALIGNMENT) == taken[2]
    assert space.allocate(6 * ALIGNMENT) == taken[4]
    space.check_integrity()


def test_freed_neighbours_become_one_hole_again() -> None:
    space = ExtentAllocator(ALIGNMENT, 9 * ALIGNMENT)
    offsets = [space.allocate(ALIGNMENT) for _ in range(8)]
    assert space.allocate(1) is None
    for at in (1, 3, 5, 7, 0, 6, 2, 4):
        offset = offsets[at]
        assert offset is not None
        space.free(offset, ALIGNMENT)
        space.check_integrity()
    assert space.free_extents() == [(ALIGNMENT, 8 * ALIGNMENT)]


def test_sizes_are_rounded_up_and_ends_down() -> None:
    space = ExtentAllocator(1, 4 * ALIGNMENT - 1)
    assert (space.begin, space.end, space.total_bytes) == (ALIGNMENT, 3 * ALIGNMENT, 2 * ALIGNMENT)
    assert space.allocate(ALIGNMENT + 1) == ALIGNMENT
    assert space.free_bytes == 0 == space.largest_free_bytes
    space.free(ALIGNMENT, ALIGNMENT + 1)
    assert space.free_bytes == 2 * ALIGNMENT


def test_a_segment_without_room_has_none() -> None:
    assert ExtentAllocator(ALIGNMENT, ALIGNMENT).allocate(1) is None


def test_extents_in_use_are_left_out() -> None:
    space = ExtentAllocator.around(0, 8 * ALIGNMENT, [(5 * ALIGNMENT, 10), (0, 2 * ALIGNMENT)])
    assert space.free_extents() == [(2 * ALIGNMENT, 3 * ALIGNMENT), (6 * ALIGNMENT, 2 * ALIGNMENT)]


@pytest.mark.parametrize(
    "used",
    [
        [(0, 2 * ALIGNMENT), (ALIGNMENT, ALIGNMENT)],
        [(0, 1), (0, 1)],
        [(7 * ALIGNMENT, 2 * ALIGNMENT)],
        [(-ALIGNMENT, ALIGNMENT)],
    ],
)
def test_extents_that_overlap_or_lie_outside_are_refused(used: list[tuple[int, int]]) -> None:
    with pytest.raises(OverlapError):
        ExtentAllocator.around(0, 8 * ALIGNMENT, used)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * ALIGNMENT)), max_size=60))
def test_whatever_is_taken_and_freed_no_two_extents_overlap(steps: list[tuple[bool, int]]) -> None:
    space = ExtentAllocator(3 * ALIGNMENT, 40 * ALIGNMENT)
    live: list[tuple[int, int]] = []
    for is_free, nbytes in steps:
        if is_free and live:
            space.free(*live.pop(nbytes % len(live)))
        else:
            offset = space.allocate(nbytes)
            if offset is None:
                assert space.largest_free_bytes < nbytes
            else:
                live.append((offset, nbytes))
        space.check_integrity()
        same = ExtentAllocator.around(3 * ALIGNMENT, 40 * ALIGNMENT, live)
        assert same.free_extents() == space.free_extents()
        assert same.free_bytes == space.free_bytes


@pytest.mark.parametrize(("sizes", "least"), [((2 * MIB,), 0.95), ((MIB // 2, MIB, 2 * MIB, 4 * MIB), 0.90)])
def test_a_segment_is_nearly_full_before_an_allocation_fails(sizes: tuple[int, ...], least: float) -> None:
    pick = random.Random(1)
    space = ExtentAllocator(0, 4096 * MIB)
    live: list[tuple[int, int]] = []
    used = []
    for _ in range(20_000):
        nbytes = pick.choice(sizes)
        while (offset := space.allocate(nbytes)) is None:
            used.append(1 - space.free_bytes / space.total_bytes)
            space.free(*live.pop(pick.randrange(len(live))))
        live.append((offset, nbytes))
    assert used[0] >= least
    assert sum(used) / len(used) >= 0.85
