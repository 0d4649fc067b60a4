"""The kernels on records against a host's directory, over random ones: on a GPU, and under Triton's interpreter.

For the interpreter ``test_record_kernels.py`` runs this in a child process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from vcache.memory.base import Memory
from vcache.memory.host import HostMemory
from vcache.pool import enqueued_records, record_kernels
from vcache.pool.enqueued_records import EnqueuedRead, EnqueuedWrite
from vcache.pool.records import GENERATION, KEY, LAYOUT, RECORD_WORDS, RunFields, pack
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.segment import Segment
from vcache.transfer.arguments import rooms_of

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACES = ["cpu"] if IS_INTERPRETED else [pytest.param("cuda:0", marks=pytest.mark.cuda)]
#: More than a program sees to.
RECORDS = 70
WORD = st.integers(0, (1 << 64) - 1)


@pytest.fixture(scope="module", autouse=True)
def assembly() -> Iterator[None]:
    if not IS_INTERPRETED:
        yield
        return
    from tests.pool.assembly import interpreted_assembly

    with interpreted_assembly():
        yield


@pytest.fixture(scope="module", params=PLACES)
def segments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Segment]]:
    """One for the kernels, one for the host's way."""
    runtime = RuntimeDir(tmp_path_factory.mktemp("runtime"))
    memory: Memory
    if IS_INTERPRETED:
        memory = HostMemory.create(runtime, b"k" * 16, 1 << 20)
    else:
        from vcache.memory.cuda import CudaMemory

        memory = CudaMemory.create(runtime, b"k" * 16, 1 << 20, device=request.param)
    made = [
        Segment.create(memory, b"k" * 16, records=RECORDS),
        Segment.create(HostMemory.create(runtime, b"h" * 16, 1 << 20), b"h" * 16, records=RECORDS),
    ]
    yield made
    for segment in made:
        segment.close()


class Case:
    """A directory in some state, and a call's records: generations, keys and a layout that may or may not be what is there."""

    def __init__(self, seed: int, count: int, layout: int) -> None:
        choose = np.random.default_rng(seed)
        self.layout = layout
        self.records = choose.permutation(RECORDS)[:count]
        self.generations = 2 + 2 * choose.permutation(1 << 20)[:count].astype(np.uint64)
        self.generations[::3] |= np.uint64(1 << 62)
        self.keys = choose.integers(0, 1 << 64, (count, 2), dtype=np.uint64)
        self.rows = pack(
            RunFields(tenant=7, rank=1, ranks=2, tokens=256, ttl_s=3, expires_s=9, layout=layout),
            keys=self.keys,
            parents=choose.integers(0, 1 << 64, (count, 2), dtype=np.uint64),
            offsets=choose.integers(0, 1 << 40, count, dtype=np.uint64),
            nbytes=choose.integers(0, 1 << 40, count, dtype=np.uint64),
            generations=self.generations,
        )
        #: Of every record's words, what the segments hold at first.
        self.image = choose.integers(0, 1 << 64, (RECORDS, RECORD_WORDS), dtype=np.uint64)
        state = choose.integers(0, 4, count)  # free, written by us, committed by us, somebody else's
        ours = self.image[self.records]
        ours[:, GENERATION] = np.choose(
            state, [np.uint64(0), self.generations - np.uint64(1), self.generations, ours[:, GENERATION]]
        )
        for word, value in ((KEY, self.keys[:, 0]), (KEY + 1, self.keys[:, 1]), (LAYOUT, np.uint64(layout))):
            ours[:, word] = np.where(choose.random(count) < 0.8, value, ours[:, word])
        self.image[self.records] = ours

    def show(self, segments: list[Segment]) -> None:
        for segment in segments:
            bytes_of_directory(segment).copy_(torch.from_numpy(self.image.view(np.uint8).ravel()))


def bytes_of_directory(segment: Segment) -> torch.Tensor:
    start = segment.directory_address - segment.memory.address
    return segment.tensor[start : start + RECORDS * RECORD_WORDS * 8]


def directory_of(segment: Segment) -> np.ndarray:
    words = bytes_of_directory(segment).cpu().numpy().view(np.uint64)
    return words.reshape(RECORDS, RECORD_WORDS)


CASES = given(st.builds(Case, st.integers(0, 1 << 32), st.integers(1, RECORDS), WORD))


@settings(max_examples=25)
@CASES
def test_records_are_marked_and_committed_as_on_a_host(segments: list[Segment], case: Case) -> None:
    case.show(segments)
    by_kernels, by_host = segments
    write = EnqueuedWrite(by_kernels, case.records, case.rows, device=segments[0].tensor.device)
    wanted = write.mark()
    marked = by_host.mark(case.records.tolist(), case.rows)
    assert wanted.tolist() == marked
    assert np.array_equal(directory_of(by_kernels), directory_of(by_host))

    for segment in segments:  # what a donor does meanwhile
        for record, generation in zip(case.records[::4].tolist(), case.generations[::4].tolist(), strict=True):
            segment.retire(record, generation)
    write.copied()
    write.commit()
    refused, committed = write.outcome()
    host_committed = by_host.commit(
        [record for record, is_marked in zip(case.records.tolist(), marked, strict=True) if is_marked],
        case.generations[marked].tolist(),
    )
    assert refused.tolist() == [not is_marked for is_marked in marked]
    assert committed[marked].tolist() == host_committed and not committed[refused].any()
    assert np.array_equal(directory_of(by_kernels), directory_of(by_host))
    write.end()
    write.end()


@settings(max_examples=25)
@CASES
def test_records_are_validated_as_on_a_host(segments: list[Segment], case: Case) -> None:
    case.show(segments)
    by_kernels, by_host = segments
    read = EnqueuedRead(
        by_kernels, case.records, case.generations, case.keys, layout=case.layout, device=segments[0].tensor.device
    )
    read.copied()
    read.validate()
    held, of_layout = read.outcome()
    assert held.tolist() == by_host.matches(case.records, case.generations, case.keys).tolist()
    assert of_layout.tolist() == (by_host.layouts(case.records) == np.uint64(case.layout)).tolist()
    assert np.array_equal(directory_of(by_kernels), case.image)
    read.end()


@pytest.mark.parametrize("record", [-1, RECORDS])
def test_a_record_beyond_the_directory_is_an_error_not_another_ones_memory(
    segments: list[Segment], record: int
) -> None:
    case = Case(1, 2, 0)
    case.records[1] = record
    with pytest.raises(IndexError, match=f"the directory has {RECORDS}"):
        EnqueuedWrite(segments[0], case.records, case.rows, device=segments[0].tensor.device)


def test_a_room_goes_to_the_next_call_once_its_own_has_ended(segments: list[Segment]) -> None:
    case = Case(1, 5, 0)
    first, second = (
        EnqueuedWrite(segments[0], case.records, case.rows, device=segments[0].tensor.device) for _ in range(2)
    )
    rooms = rooms_of(segments[0].tensor.device)
    assert first._room is not second._room
    first.end()
    assert rooms.take(1) is first._room
    assert rooms.take(1) not in (first._room, second._room)


def test_whoever_is_first_has_all_kernels_compiled_once(
    segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(record_kernels, "compile_all", lambda: asked.append("all"))
    enqueued_records._compile.cache_clear()
    case = Case(1, 5, 0)
    for _ in range(2):
        EnqueuedWrite(segments[0], case.records, case.rows, device=segments[0].tensor.device).end()
    assert asked == ["all"]


def test_this_is_the_interpreter_if_it_was_asked_for() -> None:
    assert isinstance(record_kernels.mark_kernel, InterpretedFunction) == IS_INTERPRETED
