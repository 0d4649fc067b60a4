"""Mappings: by identity, opened once, closed when the segment is gone and nobody uses it, never before."""

from __future__ import annotations

import gc
import secrets

import pytest

from vcache.memory.host import HostMemory
from vcache.pool.mappings import Mappings
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import Segment
from vcache.protocol import SegmentInfo, Tier

MIB = 1 << 20


@pytest.fixture
def runtime(runtime_dir):
    return RuntimeDir(runtime_dir)


@pytest.fixture
def mappings(runtime):
    made = Mappings(runtime, host=runtime.host_id)
    yield made
    made.close()


@pytest.fixture
def segment(runtime):
    segment_id = secrets.token_bytes(16)
    made = Segment.create(HostMemory.create(runtime, segment_id, 2 * MIB), segment_id)
    yield made
    made.close()


def info_of(segment: Segment, host: bytes, **changes) -> SegmentInfo:
    fields = {
        "number": 1,
        "segment_id": segment.segment_id,
        "incarnation": segment.incarnation,
        "tier": Tier.VRAM,  # how memory is opened follows from the device
        "host": host,
        "device": "cpu:0",
        "nbytes": segment.nbytes,
        "handle": segment.memory.handle,
        "label": "",
    }
    return SegmentInfo(**{**fields, **changes})


def maps_of(segment: Segment) -> int:
    """How often this process has the segment's file mapped, by its own donor among others."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return maps.read().count(segment.memory.handle.decode())


def test_a_segment_is_mapped_once_however_often_it_is_used(mappings, segment, runtime):
    info = info_of(segment, runtime.host_id)
    uses = [mappings.use(info) for _ in range(3)]
    assert len({id(use.segment) for use in uses}) == 1
    assert maps_of(segment) == 2
    for use in uses:
        use.release()
    assert mappings.mapped() == [(segment.segment_id, 1)]


def test_a_segment_that_is_gone_is_unmapped_after_its_last_user(mappings, segment, runtime):
    identity = (segment.segment_id, 1)
    first, second = (mappings.use(info_of(segment, runtime.host_id)) for _ in range(2))
    mappings.drop(identity)
    first.release()
    first.release()
    assert maps_of(segment) == 2, "the second user is still there"
    assert not second.segment.tensor[segment.data_offset :].any()
    second.release()
    assert maps_of(segment) == 1
    mappings.drop(identity)
    assert mappings.mapped() == []


def test_another_hosts_segment_is_not_mapped(mappings, segment):
    assert mappings.use(info_of(segment, secrets.token_bytes(16))) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"handle": b"segment-" + b"0" * 32 + b".shm"},
        {"handle": b"../../etc/passwd"},
        {"handle": b"\xff\xfe"},
        {"nbytes": MIB},
        {"incarnation": 2},
        {"segment_id": b"x" * 16},
    ],
)
def test_what_cannot_be_mapped_is_nothing_and_leaves_nothing(mappings, segment, runtime, changes):
    assert mappings.use(info_of(segment, runtime.host_id, **changes)) is None
    assert maps_of(segment) == 1
    assert mappings.mapped() == []


def test_a_processs_own_segment_is_used_where_it_is_in_every_incarnation(mappings, segment, runtime):
    mappings.adopt(segment)
    assert mappings.use(info_of(segment, runtime.host_id)).segment is segment
    segment.begin_incarnation()
    mappings.adopt(segment)
    use = mappings.use(info_of(segment, runtime.host_id))
    assert use.segment is segment
    mappings.drop((segment.segment_id, 2))
    assert use.segment.generation(0) == 0, "its donor owns it, not the mappings"
    assert not mappings.give_up(segment, 0.01)
    use.release()
    assert mappings.mapped() == []


def test_what_the_server_no_longer_lists_is_unmapped_after_a_while(mappings, segment, runtime):
    identity = (segment.segment_id, 1)
    mappings.use(info_of(segment, runtime.host_id)).release()
    assert mappings.drop_unlisted([], 100.0, 10.0) == []
    assert mappings.drop_unlisted([identity], 105.0, 10.0) == []
    assert mappings.drop_unlisted([], 109.0, 10.0) == []
    assert mappings.drop_unlisted([], 111.0, 10.0) == []
    assert mappings.drop_unlisted([], 120.0, 10.0) == [identity]
    assert maps_of(segment) == 1


def test_nothing_is_mapped_after_closing_and_what_is_in_use_stays(segment, runtime):
    mappings = Mappings(runtime, host=runtime.host_id)
    use = mappings.use(info_of(segment, runtime.host_id))
    mappings.map_ahead([info_of(segment, runtime.host_id)])
    mappings.close()
    assert mappings.use(info_of(segment, runtime.host_id)) is None
    assert maps_of(segment) == 2
    use.release()
    assert maps_of(segment) == 1
    mappings.close()
