"""Gather and scatter on a GPU, enqueued on a stream, against the definition of a payload."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.layouts import Layout, build, chunks_of, layouts, offsets_for
from vcache.paged_kv import PagedKV
from vcache.transfer import gather, scatter

pytestmark = pytest.mark.cuda


@settings(max_examples=50)
@given(data=st.data(), layout=layouts(), align=st.sampled_from([1, 4, 16]))
def test_round_trip_over_random_layouts(data: st.DataObject, layout: Layout, align: int) -> None:
    ours, theirs = build(layout, seed=1, device="cuda"), build(layout, seed=2, device="cuda")
    expected = build(layout, seed=2, device="cuda")
    blocks = data.draw(chunks_of(layout.num_blocks))
    kv = ours.paged()
    payload_bytes = kv.payload_bytes(len(blocks[0]))
    starts, nbytes = data.draw(offsets_for(len(blocks), payload_bytes, align))
    segment = torch.full((nbytes,), 7, dtype=torch.uint8, device="cuda")
    image = segment.clone()
    for ids, start in zip(blocks, starts, strict=True):
        image[start : start + payload_bytes] = ours.payload(ids)
        for plane, source in zip(expected.planes, ours.planes, strict=True):
            plane[ids] = source[ids]

    gather(kv, np.array(blocks), segment, np.array(starts))
    scatter(theirs.paged(), np.array(blocks), segment, np.array(starts))

    assert torch.equal(segment, image)
    assert all(map(torch.equal, theirs.memory, expected.memory))


def test_a_copy_waits_its_turn_on_the_callers_stream() -> None:
    caches = torch.zeros(4, 1 << 20, dtype=torch.uint8, device="cuda")
    kv, segment = PagedKV([caches], block_size=1), torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
    gather(kv, np.arange(4)[:, None], segment, np.arange(4) << 20)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # about a second
        caches.fill_(3)
        gather(kv, np.arange(4)[:, None], segment, np.arange(4) << 20)
        assert not stream.query()  # enqueued, not waited for
    stream.synchronize()
    assert segment.eq(3).all()


def test_arguments_of_queued_copies_are_not_overwritten_by_later_ones() -> None:
    caches = torch.arange(64, dtype=torch.uint8, device="cuda")[:, None].repeat(1, 64)
    kv, segment = PagedKV([caches], block_size=1), torch.zeros(64 * 64, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(200_000_000)
    for block in range(64):
        gather(kv, np.array([[block]]), segment, np.array([block * 64]))
    assert torch.equal(segment.view(64, 64), caches)
