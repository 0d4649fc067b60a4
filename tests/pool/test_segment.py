"""Segments: the header by which a mapping is believed, and lives that can be told apart."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from tests.pool.payloads import new_keys
from tests.pool.test_records import row
from vcache.errors import CapacityError, CorruptionError
from vcache.memory.host import HostMemory
from vcache.pool.records import key_words
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import MAX_RECORDS, MIN_RECORDS, Segment, default_records

MIB = 1 << 20
ID = secrets.token_bytes(16)


@pytest.fixture
def runtime(runtime_dir):
    return RuntimeDir(runtime_dir)


@pytest.fixture
def memory(device, runtime):
    if device.startswith("cuda"):
        from vcache.memory.cuda import CudaMemory

        made = CudaMemory.create(runtime, ID, 2 * MIB, device=device)
    else:
        made = HostMemory.create(runtime, ID, 2 * MIB, device=device)
    yield made
    made.close()


def put(segment: Segment, record: int, generation: int, key: bytes, *, offset: int, nbytes: int = 4096) -> None:
    assert segment.mark([record], row(generation, key, offset=offset, nbytes=nbytes)[None]) == [True]
    segment.fence()
    assert segment.commit([record], [generation]) == [True]


def holds(segment: Segment, record: int, generation: int, key: bytes) -> bool:
    return bool(segment.matches(np.array([record]), np.array([generation], dtype=np.uint64), key_words(key))[0])


def test_a_segment_opens_as_it_was_made(memory):
    made = Segment.create(memory, ID)
    opened = Segment.open(memory, ID, 1)
    assert (opened.records, opened.data_offset, opened.nbytes) == (made.records, made.data_offset, 2 * MIB)
    assert made.records == default_records(2 * MIB) == MIN_RECORDS
    assert made.data_offset % 4096 == 0
    assert list(opened.scan()) == []
    [key] = new_keys(1)
    put(made, 63, 2, key, offset=made.data_offset)
    assert holds(opened, 63, 2, key)
    assert made.retire(63, 2)
    assert not holds(opened, 63, 2, key)


@pytest.mark.parametrize(
    ("nbytes", "records"), [(1 * MIB, MIN_RECORDS), (1 << 30, 1 << 14), (1 << 40, MAX_RECORDS), (8 * MIB, 128)]
)
def test_there_is_a_record_for_every_64_kib_within_bounds(nbytes, records):
    assert default_records(nbytes) == records


def test_what_is_no_segment_is_not_believed(memory):
    with pytest.raises(CorruptionError, match="does not begin with a segment's header"):
        Segment.open(memory, ID, 1)


@pytest.mark.parametrize("word", range(10))
def test_a_flipped_bit_anywhere_in_the_header_is_noticed(memory, word):
    Segment.create(memory, ID)
    memory.words.store(word, memory.words.load(word) ^ 1 << 7)
    with pytest.raises(CorruptionError):
        Segment.open(memory, ID, 1)


def test_another_segment_or_another_life_of_it_is_not_mistaken_for_this_one(memory):
    segment = Segment.create(memory, ID)
    with pytest.raises(CorruptionError, match="expected segment"):
        Segment.open(memory, secrets.token_bytes(16), 1)
    segment.begin_incarnation()
    with pytest.raises(CorruptionError, match="incarnation 1 .*found .*incarnation 2"):
        Segment.open(memory, ID, 1)
    assert Segment.open(memory, ID, 2).incarnation == 2


def test_a_newer_format_is_refused_by_its_number(memory, monkeypatch):
    monkeypatch.setattr("vcache.pool.segment.FORMAT_VERSION", 9)
    Segment.create(memory, ID)
    monkeypatch.undo()
    with pytest.raises(CorruptionError, match="format version 9, this is 1"):
        Segment.open(memory, ID, 1)


def test_a_new_incarnation_keeps_nothing_but_the_records_that_writers_are_at(memory):
    segment = Segment.create(memory, ID)
    committed, written = new_keys(2)
    put(segment, 0, 2, committed, offset=segment.data_offset)
    assert segment.mark([1], row(4, written, offset=segment.data_offset + 4096)[None]) == [True]
    segment.begin_incarnation()
    [item] = segment.scan()
    assert (item.record, item.generation, item.key) == (1, 3, written)
    assert not holds(segment, 0, 2, committed)


def test_a_directory_that_leaves_no_room_for_data_is_refused(memory):
    with pytest.raises(CapacityError, match="no room for data"):
        Segment.create(memory, ID, records=MAX_RECORDS)


@pytest.mark.parametrize(
    ("offset", "nbytes", "inside"),
    [(0, 4096, False), (2 * MIB - 4096, 4096, True), (2 * MIB - 4096, 4097, False), (1 << 63, 4096, False), (MIB, 0, False)],
)  # fmt: skip
def test_an_extent_outside_the_data_is_told(memory, offset, nbytes, inside):
    assert Segment.create(memory, ID).contains(offset, nbytes) == inside


def test_integrity_means_whole_records_whose_extents_share_nothing(memory):
    segment = Segment.create(memory, ID)
    start = segment.data_offset
    first, second, third = new_keys(3)
    put(segment, 0, 2, first, offset=start, nbytes=8192)
    put(segment, 1, 4, second, offset=start + 8192)
    segment.check_integrity()
    put(segment, 2, 6, third, offset=start + 4096)
    with pytest.raises(CorruptionError, match="overlaps"):
        segment.check_integrity()
    segment.retire(2, 6)
    segment.check_integrity()
    put(segment, 3, 8, third, offset=start - 4096)
    with pytest.raises(CorruptionError, match="outside the data"):
        segment.check_integrity()
