"""The benchmarks that need no other process run, and their figures make sense."""

from __future__ import annotations

import pytest

from benchmarks import evict, scale
from benchmarks.state_machine import StateMachine
from vcache.protocol import KEY_BYTES, Outcome
from vram_metadata_server.integrity import check_integrity


def test_the_machine_counts_its_time_and_donors_obey():
    machine = StateMachine()
    member = machine.join("only")
    member.donate(data_bytes=16 * 4096, records=16)
    before = machine.busy_s
    for prompt in range(10):
        member.write(bytes([prompt]) * KEY_BYTES, nbytes=2 * 4096)
        machine.tick()
    assert machine.busy_s > before
    assert machine.counter("evicted") > 0
    assert not machine.service.has_work
    check_integrity(machine.service)


def test_what_is_written_is_read():
    machine = StateMachine()
    donor, reader = machine.join("donor"), machine.join("reader", host=1)
    donor.donate(data_bytes=1 << 20, records=64)
    keys = bytes(range(4 * KEY_BYTES))
    assert donor.write(keys) == bytes([Outcome.GRANTED] * 4)
    assert reader.read(keys) == 4
    assert reader.read(bytes(KEY_BYTES) + keys) == 0


def test_a_refused_request_raises():
    machine = StateMachine()
    with pytest.raises(RuntimeError, match="not a whole number"):
        machine.join("only").read(b"short")


@pytest.mark.parametrize("sizes", evict.SIZES.values(), ids=str)
def test_segments_are_nearly_full_when_eviction_begins(monkeypatch, sizes):
    monkeypatch.setattr(evict, "SEGMENT_BYTES", 2 << 30)
    assert evict.UTILISATION_BARS[len(sizes)].value <= evict.Writer(sizes, seed=0).fill() <= 1
    without_watermarks = evict.Writer(sizes, seed=0, **evict.NO_WATERMARKS)
    assert 0.99 < without_watermarks.fill() <= 1


def test_a_full_pool_goes_on_taking_writes(monkeypatch):
    monkeypatch.setattr(evict, "SEGMENT_BYTES", 2 << 30)
    writer = evict.Writer((2 << 20,), seed=0)
    writer.fill()
    pressed = writer.press(4)
    assert pressed.refused < 0.5
    assert 0 < pressed.reserve_us < pressed.all_us


def test_every_operation_of_a_pool_of_many_is_timed():
    measured = scale.measure(scale.Point(scale.BY_DONORS, donors=24, entries=512), samples=3)
    assert set(measured.operations) >= {"acquire", "lookup", "reserve and commit", "heartbeat", "a donor leaves"}
    assert all(len(samples) == 3 for samples in measured.operations.values())
