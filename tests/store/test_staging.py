"""Staging memory: blocks never overlap, and come back only when everybody let go."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.store.objects import PAGE_BYTES
from vcache.store.staging import Staging

MIB = 1 << 20


@given(st.lists(st.one_of(st.lists(st.integers(1, 100_000), max_size=5), st.integers(0, 30)), max_size=40))
def test_free_and_taken_always_add_up(steps):
    staging = Staging(MIB)
    held = []
    for step in steps:
        if isinstance(step, list):
            held += staging.take(step)
        elif held:
            held.pop(step % len(held)).release()
        staging.check_integrity()
    for number, block in enumerate(held):
        block.tensor.fill_(number)
    assert all((block.tensor == number).all() for number, block in enumerate(held))
    for block in held:
        block.release()
    staging.check_integrity()
    assert staging.free_bytes == MIB
    assert staging.close()


def test_a_block_comes_back_only_with_its_last_hold():
    staging = Staging(MIB)
    (block,) = staging.take([MIB - PAGE_BYTES])
    block.hold()
    block.release()
    assert staging.take([1]) == []
    block.release()
    assert len(staging.take([1])) == 1
    with pytest.raises(ValueError, match="already given back"):
        block.release()


def test_as_many_are_taken_as_there_is_room_for():
    staging = Staging(MIB)
    assert len(staging.take([300_000] * 5)) == 3


def test_a_block_is_found_by_its_payload():
    staging = Staging(MIB)
    first, second = staging.take([5000, 6000])
    assert staging.block_of(second.tensor) is second
    assert staging.block_of(second.tensor[1:]) is None
    assert staging.block_of(first.tensor[:10]) is None
    first.release()
    assert staging.block_of(first.tensor) is None


def test_taking_can_wait_for_room():
    staging = Staging(MIB)
    (block,) = staging.take([MIB - PAGE_BYTES])
    taken = []
    waiter = threading.Thread(target=lambda: taken.extend(staging.take([5], wait_s=60)))
    waiter.start()
    block.release()
    waiter.join()
    assert len(taken) == 1


def test_memory_outlives_the_arena_while_a_block_is_held():
    staging = Staging(MIB)
    (block,) = staging.take([1000])
    assert not staging.close()
    block.tensor.fill_(7)
    assert int(block.tensor.sum()) == 7000
    assert staging.take([1]) == []
    block.release()
    assert staging.close()
