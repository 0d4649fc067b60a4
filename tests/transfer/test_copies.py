"""Gather and scatter on a CPU, against the definition of a payload, over random layouts; nothing else is ever touched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.layouts import Layout, build, chunks_of, layouts, offsets_for
from vcache.paged_kv import PagedKV
from vcache.transfer import cpu, gather, scatter


@pytest.fixture(autouse=True, scope="module")
def _pieces_of_any_size() -> Iterator[None]:
    """Small copies too are cut up among the threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BYTES_PER_THREAD", 1)
        patch.setattr(cpu, "STEP_BYTES", 1)
        yield


def _segment(nbytes: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))


@given(data=st.data(), layout=layouts(), threads=st.integers(1, 3))
def test_gather_writes_the_payloads_and_nothing_else(data: st.DataObject, layout: Layout, threads: int) -> None:
    caches = build(layout, seed=1)
    kv = caches.paged()
    blocks = data.draw(chunks_of(layout.num_blocks))
    offsets, nbytes = data.draw(offsets_for(len(blocks), kv.payload_bytes(len(blocks[0]))))
    segment = _segment(nbytes, seed=2)
    expected = segment.clone()
    for ids, offset in zip(blocks, offsets, strict=True):
        payload = caches.payload(ids)
        expected[offset : offset + len(payload)] = payload
    before = caches.copy_of_memory()

    gather(kv, np.array(blocks), segment, np.array(offsets), threads=threads)

    assert torch.equal(segment, expected)
    assert all(map(torch.equal, caches.memory, before))


@given(data=st.data(), layout=layouts(), threads=st.integers(1, 3))
def test_scatter_writes_the_blocks_and_nothing_else(data: st.DataObject, layout: Layout, threads: int) -> None:
    caches = build(layout, seed=1)
    kv = caches.paged()
    blocks = data.draw(chunks_of(layout.num_blocks))
    payload_bytes = kv.payload_bytes(len(blocks[0]))
    offsets, nbytes = data.draw(offsets_for(len(blocks), payload_bytes))
    segment = _segment(nbytes, seed=2)
    before = segment.clone()
    expected = build(layout, seed=1)
    for ids, offset in zip(blocks, offsets, strict=True):
        rows = segment[offset : offset + payload_bytes].view(len(expected.planes), len(ids), -1)
        for plane, row in zip(expected.planes, rows, strict=True):
            plane[torch.tensor(ids)] = row

    scatter(kv, np.array(blocks), segment, np.array(offsets), threads=threads)

    assert all(map(torch.equal, caches.memory, expected.memory))
    assert torch.equal(segment, before)


@given(data=st.data(), layout=layouts(), threads=st.integers(1, 3))
def test_what_one_engine_stores_another_loads_into_other_blocks(
    data: st.DataObject, layout: Layout, threads: int
) -> None:
    ours, theirs = build(layout, seed=1), build(layout, seed=2)
    stored = data.draw(chunks_of(layout.num_blocks))
    shift = data.draw(st.integers(0, layout.num_blocks - 1))
    loaded = [[(block + shift) % layout.num_blocks for block in ids] for ids in stored]
    payload_bytes = ours.paged().payload_bytes(len(stored[0]))
    offsets = np.arange(len(stored)) * payload_bytes
    segment = _segment(len(stored) * payload_bytes, seed=3)

    gather(ours.paged(), np.array(stored), segment, offsets, threads=threads)
    scatter(theirs.paged(), np.array(loaded), segment, offsets, threads=threads)

    for ids, other_ids in zip(stored, loaded, strict=True):
        assert torch.equal(theirs.payload(other_ids), ours.payload(ids))


def test_planes_of_different_block_sizes_move_together() -> None:
    wide, narrow = _segment(5 * 48, seed=1), _segment(5 * 12, seed=2)
    kv = PagedKV([wide.view(5, 4, 12), narrow.view(5, 4, 3)], block_size=4)
    segment = torch.zeros(2 * 60, dtype=torch.uint8)
    gather(kv, np.array([[4, 1]]), segment, np.array([0]))
    by_plane = [wide.view(5, 48)[[4, 1]].reshape(-1), narrow.view(5, 12)[[4, 1]].reshape(-1)]
    assert torch.equal(segment, torch.cat(by_plane))


def test_large_copies_by_several_threads_are_whole_when_the_call_returns() -> None:
    planes = _segment(6 * 64 * 65_536, seed=1).view(6, 64, 65_536)
    kv = PagedKV(list(planes.clone().unbind(0)), block_size=1)
    ids = np.random.default_rng(0).permutation(64).reshape(4, 16)
    offsets = np.arange(4) * kv.payload_bytes(16)
    segment = torch.zeros(4 * kv.payload_bytes(16), dtype=torch.uint8)
    for _ in range(5):
        gather(kv, ids, segment.zero_(), offsets, threads=4)
        for number, chunk in enumerate(segment.view(4, 6, 16, 65_536)):
            assert torch.equal(chunk, planes[:, torch.from_numpy(ids[number])])


@pytest.mark.parametrize("block_bytes", [1, 15, 16, 63, 64, 65, 200, 4097])
@pytest.mark.parametrize("shift", [0, 1, 8, 15])
def test_blocks_of_any_size_at_any_address_are_copied_whole(block_bytes: int, shift: int) -> None:
    """Heads and tails of what is copied in vectors, runs of neighbours among them."""
    ids = np.array([[0, 1, 2, 7, 5, 6]])
    memory = _segment(2 * 8 * block_bytes + shift, seed=1)
    planes = memory[shift:].view(2, 8, block_bytes)
    expected = planes[:, ids[0]].reshape(-1)
    segment = _segment(len(expected) + 2 * shift + 3, seed=2)
    around = segment.clone()
    gather(PagedKV([planes], block_size=block_bytes, block_axis=1), ids, segment, np.array([shift]))
    assert torch.equal(segment[shift : shift + len(expected)], expected)
    assert torch.equal(segment[:shift], around[:shift])
    assert torch.equal(segment[shift + len(expected) :], around[shift + len(expected) :])

    other = _segment(2 * 8 * block_bytes + 15 - shift, seed=3)
    loaded = other[15 - shift :].view(2, 8, block_bytes)
    untouched = loaded[:, [3, 4]].clone()
    scatter(PagedKV([loaded], block_size=block_bytes, block_axis=1), ids, segment, np.array([shift]))
    assert torch.equal(loaded[:, ids[0]].reshape(-1), expected)
    assert torch.equal(loaded[:, [3, 4]], untouched)


def test_a_block_may_be_stored_twice() -> None:
    caches = _segment(4 * 8, seed=1).view(4, 8)
    segment = torch.zeros(32, dtype=torch.uint8)
    gather(PagedKV([caches], block_size=8), np.array([[2, 2], [2, 0]]), segment, np.array([16, 0]))
    assert torch.equal(segment.view(4, 8), caches[[2, 0, 2, 2]])


def test_no_chunks_is_no_work() -> None:
    kv = PagedKV([torch.zeros(4, 8, dtype=torch.uint8)], block_size=8)
    for copy in (gather, scatter):
        copy(kv, np.empty((0, 2), np.int64), torch.zeros(4, dtype=torch.uint8), np.empty(0, np.int64))
        copy(kv, np.empty((1, 0), np.int64), torch.zeros(4, dtype=torch.uint8), np.array([4]))


BAD_ARGUMENTS = {
    "block beyond the end": ([[0, 1], [2, 4]], [0, 16], r"block_ids\[1, 1\] is 4; there are blocks 0 to 3"),
    "block below zero": ([[-1, 1]], [0], r"block_ids\[0, 0\] is -1"),
    "blocks as floats": ([[0.0, 1.0]], [0], "block_ids must be a 2-D array of int64, not 2-D float64"),
    "blocks in one row": ([0, 1], [0], "block_ids must be a 2-D array"),
    "offsets in two rows": ([[0, 1]], [[0]], "offsets must be a 1-D array"),
    "too few offsets": ([[0, 1], [2, 3]], [0], "offsets has 1 entries for the 2 chunks of block_ids"),
    "payload beyond the end": (
        [[0, 1], [2, 3]],
        [0, 49],
        r"offsets\[1\] is 49; a payload of 16 bytes .* segment of 64",
    ),
    "payload before the start": ([[0, 1]], [-8], r"offsets\[0\] is -8"),
}


@pytest.mark.parametrize("copy", [gather, scatter])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named_and_nothing_is_written(copy: object, case: str) -> None:
    block_ids, offsets, message = BAD_ARGUMENTS[case]
    _refused(copy, np.array(block_ids), np.array(offsets), message)


def test_a_load_that_would_write_a_block_twice_is_refused() -> None:
    _refused(scatter, np.array([[0, 3], [1, 3]]), np.array([0, 16]), "block_ids holds block 3 twice")


def test_a_store_into_payloads_that_share_bytes_is_refused() -> None:
    _refused(gather, np.array([[0, 3], [1, 2]]), np.array([20, 5]), "offsets 5 and 20 are closer than a payload of 16")


def _refused(copy: object, block_ids: np.ndarray, offsets: np.ndarray, message: str) -> None:
    planes, segment = _segment(32, seed=1).view(4, 8), _segment(64, seed=2)
    before = planes.clone(), segment.clone()
    assert callable(copy)
    with pytest.raises(ValueError, match=message):
        copy(PagedKV([planes], block_size=8), block_ids, segment, offsets)
    assert torch.equal(planes, before[0]) and torch.equal(segment, before[1])


@pytest.mark.parametrize(
    "segment", [torch.zeros(64), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)[::2]]
)
def test_a_segment_that_is_not_plain_bytes_is_refused(segment: torch.Tensor) -> None:
    kv = PagedKV([torch.zeros(4, 8, dtype=torch.uint8)], block_size=8)
    with pytest.raises(ValueError, match="contiguous 1-D uint8"):
        gather(kv, np.array([[0]]), segment, np.array([0]))
