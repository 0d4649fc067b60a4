"""Mappings: by identity, opened once, closed when the segment is gone and nobody uses it, never before."""

from __future__ import annotations

import gc
import logging
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pool.payloads import copy_out, load, new_keys, payload, store, until
from vcache.memory.host import HostMemory
from vcache.pool import mappings as mappings_module
from vcache.pool.mappings import Mappings
from vcache.pool.reading import begin_read
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import Segment
from vcache.protocol import SegmentInfo, Tier
from vcache.transfer_config import TransferConfig

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
def idling(runtime):
    """Mappings that close what was idle for ten seconds, by the clock of the test."""
    made = Mappings(runtime, host=runtime.host_id, settings=TransferConfig(unmap_after=10.0))
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
    mappings.drop_unlisted([], 100.0, 10.0)
    mappings.drop_unlisted([identity], 105.0, 10.0)
    mappings.drop_unlisted([], 109.0, 10.0)
    mappings.drop_unlisted([], 111.0, 10.0)
    assert mappings.mapped() == [identity]
    mappings.drop_unlisted([], 120.0, 10.0)
    assert mappings.mapped() == []
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


@pytest.fixture
def slow(monkeypatch):
    """Opening memory takes until the test says; and an event that says that somebody is at it."""
    begun, may_end, really = threading.Event(), threading.Event(), mappings_module._open_memory

    def open_slowly(*arguments, **named):
        begun.set()
        assert may_end.wait(60)
        return really(*arguments, **named)

    monkeypatch.setattr(mappings_module, "_open_memory", open_slowly)
    yield begun, may_end
    may_end.set()


def test_a_segment_that_takes_long_to_open_holds_up_only_those_who_want_it(mappings, segment, runtime, slow):
    begun, may_end = slow
    own = Segment.create(HostMemory.create(runtime, b"o" * 16, 2 * MIB), b"o" * 16)
    mappings.adopt(own)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(mappings.use, info_of(segment, runtime.host_id)) for _ in range(3)]
        assert begun.wait(60)
        mappings.use(info_of(own, runtime.host_id)).release()
        mappings.unmap_idle(1.0)
        assert mappings.mapped() == [(own.segment_id, 1)]
        assert not any(use.done() for use in waiting)
        may_end.set()
        uses = [use.result() for use in waiting]
    assert len({id(use.segment) for use in uses}) == 1
    assert maps_of(segment) == 2
    for use in uses:
        use.release()
    assert mappings.give_up(own, 1.0)
    own.close()


def test_what_cannot_be_opened_is_nothing_to_all_who_waited_for_it(mappings, segment, runtime, slow):
    begun, may_end = slow
    missing = info_of(segment, runtime.host_id, handle=b"segment-" + b"0" * 32 + b".shm")
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(mappings.use, missing) for _ in range(2)]
        assert begun.wait(60)
        may_end.set()
        assert [use.result() for use in waiting] == [None, None]
    use = mappings.use(info_of(segment, runtime.host_id))
    assert use is not None
    use.release()


def test_what_is_opened_when_all_has_been_closed_goes_with_its_user(segment, runtime, slow):
    begun, may_end = slow
    mappings = Mappings(runtime, host=runtime.host_id)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(mappings.use, info_of(segment, runtime.host_id))
        assert begun.wait(60)
        mappings.close()
        may_end.set()
        use = waiting.result()
    assert mappings.mapped() == []
    use.release()
    assert maps_of(segment) == 1


def test_what_nobody_has_used_for_a_while_is_unmapped_and_mapped_again_at_its_next_use(idling, segment, runtime):
    identity, info = (segment.segment_id, 1), info_of(segment, runtime.host_id)
    idling.use(info).release()
    idling.unmap_idle(100.0)
    idling.unmap_idle(110.0)
    assert idling.mapped() == [identity]
    idling.unmap_idle(110.1)
    assert idling.mapped() == []
    assert maps_of(segment) == 1
    segment.tensor[segment.data_offset] = 7
    use = idling.use(info)
    assert use.segment.tensor[segment.data_offset] == 7
    assert maps_of(segment) == 2
    use.release()


def test_what_is_in_use_or_was_used_meanwhile_is_not_idle(idling, segment, runtime):
    identity, info = (segment.segment_id, 1), info_of(segment, runtime.host_id)
    use = idling.use(info)
    idling.unmap_idle(100.0)
    idling.unmap_idle(500.0)
    use.release()
    idling.unmap_idle(600.0)
    assert idling.mapped() == [identity], "idle since now, as far as anybody knows"
    idling.use(info).release()
    idling.unmap_idle(700.0)
    idling.unmap_idle(709.0)
    assert idling.mapped() == [identity]
    idling.unmap_idle(711.0)
    assert idling.mapped() == []


def test_a_processs_own_segment_is_never_idle_and_without_a_limit_none_is(idling, segment, runtime):
    identity = (segment.segment_id, 1)
    idling.adopt(segment)
    idling.unmap_idle(100.0)
    idling.unmap_idle(10_000.0)
    assert idling.mapped() == [identity]
    lasting = Mappings(runtime, host=runtime.host_id, settings=TransferConfig(unmap_after=0))
    lasting.use(info_of(segment, runtime.host_id)).release()
    lasting.unmap_idle(100.0)
    lasting.unmap_idle(10_000.0)
    assert lasting.mapped() == [identity]
    lasting.close()


def test_users_that_come_while_it_is_unmapped_read_what_is_there(mappings, segment, runtime):
    """However often it goes away under them, each sees the segment, whole, for as long as it uses it."""
    segment.tensor[segment.data_offset :].fill_(9)
    info, right = info_of(segment, runtime.host_id), []

    def use_often() -> None:
        for _ in range(100):
            use = mappings.use(info)
            right.append(use.segment.memory.array[segment.data_offset :: 65_536].min() == 9)
            use.release()

    threads = [threading.Thread(target=use_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        mappings.drop((segment.segment_id, 1))
    assert right == [True] * 200
    mappings.close()
    assert maps_of(segment) == 1


def test_a_reader_outlasts_idleness_and_reads_on_after_it(start_server, open_client, open_donor):
    """In a client, by its heartbeats: nothing is unmapped under a read, and what was idle is there when it is wanted."""
    config, _ = start_server(
        server={"heartbeat_interval": "50ms", "liveness_timeout": "3s"}, transfer={"unmap_after": "200ms"}
    )
    donor = open_donor(config)
    client = open_client(config)
    identity = (donor.segment.segment_id, donor.segment.incarnation)
    keys = new_keys(3)
    assert store(client, keys) == 3
    until(lambda: client.mappings.mapped() == [], "it was idle")
    read = begin_read(client, keys, 0)
    copied = copy_out(read)
    idle = threading.Event()
    assert not idle.wait(1.0), "longer than what counts as idle"
    assert client.mappings.mapped() == [identity]
    assert read.complete() == 3
    assert [copied[chunk] for chunk in range(3)] == [payload(key) for key in keys]
    until(lambda: client.mappings.mapped() == [], "it was idle again")
    assert load(client, keys) == 3


def test_a_process_with_a_gpu_closes_in_a_thread_that_may_wait_and_does_without_pinned_memory(runtime, segment, caplog):
    caplog.set_level(logging.WARNING)
    mappings = Mappings(runtime, host=runtime.host_id, device="GPU-of-another-machine")
    uses = [mappings.use(info_of(segment, runtime.host_id)) for _ in range(2)]
    until(lambda: "are not pinned" in caplog.text, "it was tried")
    mappings.drop((segment.segment_id, 1))
    uses[0].release()
    assert not uses[1].segment.tensor[segment.data_offset :].any()
    uses[1].release()
    until(lambda: maps_of(segment) == 1, "it is unmapped")
    again = mappings.use(info_of(segment, runtime.host_id))
    mappings.close()
    assert maps_of(segment) == 2
    again.release()
    assert maps_of(segment) == 1
