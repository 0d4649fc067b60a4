"""The way to a peer GPU's memory: chosen by measurement, once for each pair, and told of the tensor, since torch cannot know."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from vcache import transfer
from vcache.paged_kv import PagedKV
from vcache.transfer import staged, ways
from vcache.transfer.ways import PeerWays, Seconds, Way, attach, faster, measured, way_to

HERE, THERE = "GPU-of-this-test", "GPU-of-another"


@pytest.mark.parametrize(
    ("kernel", "copy", "way"),
    [
        (100e-6, 50e-6, Way.COPY),
        (50e-6, 100e-6, Way.KERNEL),
        (100e-6, 100e-6, Way.KERNEL),
        (100e-6, 96e-6, Way.KERNEL),  # not by more than measurements vary
        (100e-6, 94e-6, Way.COPY),
    ],
)
def test_the_faster_way_is_taken_and_the_kernel_where_it_makes_no_difference(kernel, copy, way):
    assert faster(Seconds(kernel, copy)) is way


def test_each_pair_is_measured_once_in_each_direction():
    peers, asked = PeerWays(), []

    def measure(pair: str, copy: float):
        def answer() -> Seconds:
            asked.append(pair)
            return Seconds(1.0, copy)

        return answer

    for _ in range(3):
        assert peers.choose("a", "b", setting="auto", measure=measure("ab", 0.5)) is Way.COPY
        assert peers.choose("b", "a", setting="auto", measure=measure("ba", 2.0)) is Way.KERNEL
    assert asked == ["ab", "ba"]


def test_one_gpu_and_a_way_that_is_set_are_not_measured():
    def measure() -> Seconds:
        raise AssertionError("nothing to measure")

    peers = PeerWays()
    assert peers.choose("a", "a", setting="copy", measure=measure) is Way.KERNEL
    assert peers.choose("a", "b", setting="copy", measure=measure) is Way.COPY
    assert peers.choose("a", "b", setting="kernel", measure=measure) is Way.KERNEL


def test_a_measurement_that_fails_is_tried_again_with_the_next_segment():
    peers = PeerWays()

    def fail() -> Seconds:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        peers.choose("a", "b", setting="auto", measure=fail)
    assert peers.choose("a", "b", setting="auto", measure=lambda: Seconds(2.0, 1.0)) is Way.COPY


def test_threads_that_map_at_the_same_time_measure_once():
    peers, asked = PeerWays(), []
    together = threading.Barrier(4)

    def measure() -> Seconds:
        asked.append(1)
        return Seconds(1.0, 2.0)

    def choose() -> None:
        together.wait()
        peers.choose("a", "b", setting="auto", measure=measure)

    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]


def test_the_way_belongs_to_the_segment_and_goes_with_it():
    before = len(ways._by_copy)
    segment, other = torch.zeros(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    attach(segment, 0, reader=HERE, owner=THERE, setting="copy")
    attach(other, 0, reader=HERE, owner=HERE, setting="copy")
    assert (way_to(segment), way_to(other)) == (Way.COPY, Way.KERNEL)
    assert way_to(segment[:1024]) is Way.KERNEL, "what nobody attached is a kernel's"
    del segment
    gc.collect()
    assert len(ways._by_copy) == before


@pytest.mark.cuda
def test_by_copy_the_bytes_are_the_same_and_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(staged, "BUFFER_BYTES", 3 << 20)
    planes = torch.randint(0, 256, (8, 1 << 20), dtype=torch.uint8, device="cuda")
    kv, ids, offsets = PagedKV([planes], block_size=1), np.arange(8)[:, None], np.arange(8) << 20
    segment = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")
    attach(segment, 0, reader=HERE, owner=THERE, setting="copy")
    assert way_to(segment) is Way.COPY
    expected = planes.clone()
    transfer.gather(kv, ids, segment, offsets)
    planes.zero_()
    for cycles in (0, 200_000_000):  # compiles; then takes as much pinned memory as is needed at a time
        torch.cuda._sleep(cycles)
        transfer.scatter(kv, ids, segment, offsets)
        torch.cuda.synchronize()
    planes.zero_()
    torch.cuda._sleep(2_000_000_000)  # about a second
    transfer.scatter(kv, ids, segment, offsets)
    assert not torch.cuda.current_stream().query()
    assert torch.equal(planes, expected)


@pytest.mark.cuda
def test_without_room_for_a_buffer_a_kernel_reaches_across(monkeypatch):
    planes = torch.randint(0, 256, (8, 4096), dtype=torch.uint8, device="cuda")
    kv, ids, offsets = PagedKV([planes], block_size=1), np.arange(8)[:, None], np.arange(8) * 4096
    segment, expected = torch.zeros(8 * 4096, dtype=torch.uint8, device="cuda"), planes.clone()
    attach(segment, 0, reader=HERE, owner=THERE, setting="copy")
    transfer.gather(kv, ids, segment, offsets)
    planes.zero_()

    def none_left(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(staged, "_buffer", none_left)
    transfer.scatter(kv, ids, segment, offsets)
    assert torch.equal(planes, expected)


@pytest.mark.cuda
def test_measuring_takes_both_ways_and_leaves_the_segment_as_it_is():
    segment = torch.randint(0, 256, (9 << 20,), dtype=torch.uint8, device="cuda")
    image = segment.clone()
    torch.cuda.synchronize()
    found = measured(segment, 4096)
    assert found.kernel > 0 and found.copy > 0
    assert torch.equal(segment, image)
