"""Copies between planes and payloads on devices of different kinds: piece by piece, through a buffer on the planes' device.

The pieces are the same whatever the devices are, so most of it runs on any machine, from host memory to host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.layouts import Layout, build, chunks_of, layouts, offsets_for
from vcache import transfer
from vcache.paged_kv import PagedKV
from vcache.transfer import cpu, staged
from vcache.transfer.checks import check_gather, check_scatter

KINDS = [
    pytest.param("cpu", "cpu", id="host"),
    pytest.param("cuda", "cpu", id="planes on a GPU", marks=pytest.mark.cuda),
    pytest.param("cpu", "cuda", id="segment on a GPU", marks=pytest.mark.cuda),
]


@pytest.fixture(autouse=True, scope="module")
def _small_buffer() -> Iterator[None]:
    """Room for a few payloads, often for less than one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "BUFFER_BYTES", 1000)
        yield


def gather(kv: PagedKV, ids: np.ndarray, segment: torch.Tensor, offsets: np.ndarray) -> None:
    if segment.device.type != kv.device.type:
        with transfer.settled(kv.device):
            transfer.gather(kv, ids, segment, offsets)
    else:
        staged.gather(kv, check_gather(kv, ids, segment, offsets), segment, cpu.gather)


def scatter(kv: PagedKV, ids: np.ndarray, segment: torch.Tensor, offsets: np.ndarray) -> None:
    if segment.device.type != kv.device.type:
        with transfer.settled(kv.device):
            transfer.scatter(kv, ids, segment, offsets)
    else:
        staged.scatter(kv, check_scatter(kv, ids, segment, offsets), segment, cpu.scatter)


@pytest.mark.parametrize(("planes", "memory"), KINDS)
@settings(max_examples=50)
@given(data=st.data(), layout=layouts())
def test_round_trip_over_random_layouts(data: st.DataObject, layout: Layout, planes: str, memory: str) -> None:
    ours, theirs = build(layout, seed=1, device=planes), build(layout, seed=2, device=planes)
    expected = build(layout, seed=2, device=planes)
    blocks = data.draw(chunks_of(layout.num_blocks))
    kv = ours.paged()
    payload_bytes = kv.payload_bytes(len(blocks[0]))
    starts, nbytes = data.draw(offsets_for(len(blocks), payload_bytes))
    segment = torch.full((nbytes,), 7, dtype=torch.uint8, device=memory)
    image = segment.clone()
    for ids, start in zip(blocks, starts, strict=True):
        image[start : start + payload_bytes] = ours.payload(ids).to(memory)
        for plane, source in zip(expected.planes, ours.planes, strict=True):
            plane[ids] = source[ids]

    gather(kv, np.array(blocks), segment, np.array(starts))
    assert torch.equal(segment, image)
    scatter(theirs.paged(), np.array(blocks), segment, np.array(starts))
    assert torch.equal(segment, image)
    assert all(map(torch.equal, theirs.memory, expected.memory))


@pytest.mark.parametrize(("planes", "memory"), KINDS)
def test_the_buffer_is_small_and_smaller_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, planes: str, memory: str
) -> None:
    caches = torch.arange(32, dtype=torch.uint8, device=planes)[:, None].repeat(1, 100)
    kv, segment = PagedKV([caches], block_size=1), torch.zeros(3200, dtype=torch.uint8, device=memory)
    ids, offsets = np.arange(32)[:, None], np.arange(32) * 100
    taken: list[int] = []
    room = [1000]
    empty = torch.empty

    def scarce(count: int, **form: Any) -> torch.Tensor:
        if form["dtype"] is torch.uint8:  # not the few words that a kernel's arguments take
            taken.append(count)
            if count > room[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(count, **form)

    monkeypatch.setattr(torch, "empty", scarce)
    gather(kv, ids, segment, offsets)
    assert taken == [1000]
    assert torch.equal(segment.cpu().view(32, 100), caches.cpu())
    caches.zero_()
    room[0] = 300
    scatter(kv, ids, segment, offsets)
    assert taken == [1000, 1000, 500, 200]
    assert torch.equal(segment.cpu().view(32, 100), caches.cpu())
    room[0] = 99
    for copy in (gather, scatter):
        with pytest.raises(torch.OutOfMemoryError):
            copy(kv, ids, segment, offsets)


@pytest.mark.cuda
def test_between_a_gpu_and_pinned_memory_it_is_enqueued_and_can_be_waited_for() -> None:
    """What is written over the planes behind it does not matter, nor does the buffer's being given to others."""
    caches = torch.zeros(4, 1 << 20, dtype=torch.uint8, device="cuda")
    kv, segment = PagedKV([caches], block_size=1), torch.zeros(4 << 20, dtype=torch.uint8, pin_memory=True)
    ids, offsets = np.arange(4)[:, None], np.arange(4) << 20
    stream = torch.cuda.current_stream()
    for cycles in (0, 200_000_000):  # compiles; then takes as much pinned memory as is needed at a time
        torch.cuda._sleep(cycles)
        transfer.gather(kv, ids, segment, offsets)
        stream.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    caches.fill_(3)
    transfer.gather(kv, ids, segment, offsets)
    caches.fill_(4)
    torch.full((1 << 20,), 5, dtype=torch.uint8, device="cuda")
    copied = transfer.recorded(kv.device)
    assert not copied.query() and not segment.any()
    copied.synchronize()
    assert segment.eq(3).all()
    torch.cuda._sleep(200_000_000)
    with transfer.settled(kv.device):
        transfer.scatter(kv, ids, segment, offsets)
    assert stream.query()
    assert caches.eq(3).all()


def test_arguments_are_checked_before_anything_moves() -> None:
    kv, segment = PagedKV([torch.ones(4, 8, dtype=torch.uint8)], block_size=8), torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="offsets 0 and 4 are closer than a payload"):
        gather(kv, np.array([[0], [1]]), segment, np.array([4, 0]))
    assert not segment.any()


def test_no_chunks_is_no_work() -> None:
    kv, segment = PagedKV([torch.zeros(4, 8, dtype=torch.uint8)], block_size=8), torch.zeros(4, dtype=torch.uint8)
    for copy in (gather, scatter):
        copy(kv, np.empty((0, 2), np.int64), segment, np.empty(0, np.int64))
