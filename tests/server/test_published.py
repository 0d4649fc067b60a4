"""The index in shared memory by itself: it agrees with a dictionary, grows, ends cleanly, and never shows a key that never was."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.processes import REPOSITORY, Processes, host_directory
from vcache.errors import UnavailableError
from vcache.pool import shared_index
from vcache.pool.index_reader import IndexReader
from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.shared_index import index_bytes
from vram_metadata_server import published as published_module
from vram_metadata_server.published import PublishedIndex

TERM = 1_795_000_000_000
FEW_SLOTS = 16
#: Lookups for a key that never was, while two keys that it is made of take turns.
LOOKUPS = 60_000


def key(name: int) -> bytes:
    """As real ones: a digest, whose halves say nothing of each other."""
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


@pytest.fixture
def runtime(runtime_dir: Path) -> RuntimeDir:
    return RuntimeDir(runtime_dir)


@pytest.fixture
def published(runtime: RuntimeDir) -> Iterator[PublishedIndex]:
    index = PublishedIndex(runtime, term=TERM, max_bytes=1 << 24, min_slots=FEW_SLOTS)
    yield index
    index.close()


@pytest.fixture
def reader(runtime: RuntimeDir) -> IndexReader:
    return IndexReader(runtime)


def placement(name: bytes) -> bytes:
    """As if that were one; its second word is not 0."""
    return 2 * name


def publish(index: PublishedIndex, changes: dict[bytes, bool], *, is_exact: bool = True) -> None:
    index.changes.update({name: placement(name) if is_whole else None for name, is_whole in changes.items()})
    index.update(is_exact=is_exact)
    assert not index.changes


def files(runtime: RuntimeDir) -> list[str]:
    return sorted(path.name for path in runtime.path.glob("index-*"))


def home(name: bytes) -> int:
    """As docs/index-format.md has it."""
    whole = (1 << 64) - 1
    low, high = int.from_bytes(name[:8], "little"), int.from_bytes(name[8:], "little")
    mixed = low ^ (high * 0x9E3779B97F4A7C15 & whole)
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & whole
    return mixed ^ mixed >> 32


#: Two keys with one slot for both and for a key of the first's low and the second's high half, which never is in the table.
FIRST, SECOND, MIXED = next(
    (first, second, first[:8] + second[8:])
    for first, second in itertools.permutations(map(key, range(200)), 2)
    if home(first) % FEW_SLOTS == home(second) % FEW_SLOTS == home(first[:8] + second[8:]) % FEW_SLOTS
)

batches = st.lists(st.dictionaries(st.integers(0, 60), st.booleans(), max_size=40), max_size=12)


@pytest.mark.parametrize("pace", [(1 << 20, 1 << 20), (512, 2), (200, 1)], ids=["at once", "slowly", "too slowly"])
@given(batches, st.integers(0, 59))
def test_it_says_what_a_set_says(pace: tuple[int, int], batches: list[dict[int, bool]], start: int) -> None:
    """``pace``: how much of the next table each change makes, in bytes and in slots."""
    with host_directory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_module, "ALLOCATED_PER_CHANGE", pace[0])
        patch.setattr(published_module, "COPIED_PER_CHANGE", pace[1])
        runtime = RuntimeDir(directory)
        index = PublishedIndex(runtime, term=TERM, max_bytes=1 << 20, min_slots=FEW_SLOTS)
        reader, expected = IndexReader(runtime), set[int]()
        for batch in batches:
            publish(index, {key(name): is_there for name, is_there in batch.items()})
            expected = {n for n in expected | batch.keys() if batch.get(n, n in expected)}
            for name in range(60):
                assert reader.run(index.name, TERM, key(name)) == (name in expected)
            run = list(itertools.takewhile(expected.__contains__, range(start, 60)))
            asked = b"".join(map(key, range(start, 60)))
            assert reader.run(index.name, TERM, asked) == len(run)
            assert reader.find(index.name, TERM, asked) == b"".join(placement(key(name)) for name in run)
        assert files(runtime) in ([index.name], [index.name, f"{index.name}.new"])
        index.close()
        assert files(runtime) == []


def test_a_key_lies_where_the_document_says(published: PublishedIndex, runtime: RuntimeDir) -> None:
    publish(published, {FIRST: True})
    held = (runtime.path / published.name).read_bytes()
    at = 64 + 64 * (home(FIRST) % FEW_SLOTS)
    assert len(held) == index_bytes(FEW_SLOTS) == 64 + 64 * FEW_SLOTS
    assert held[:8] == b"VCACHIDX" and held[8] == 2 and held[32] == 1
    assert int.from_bytes(held[16:24], "little") == TERM and held[24] == FEW_SLOTS
    assert held[at] & 3 == 2 and held[at + 8 : at + 24] == FIRST
    assert held[at + 24 : at + 56] == placement(FIRST) and held[at + 56 : at + 64] == bytes(8)


def test_a_chunk_that_moves_is_found_where_it_is(published: PublishedIndex, reader: IndexReader) -> None:
    publish(published, {key(0): True, key(1): True})
    published.changes[key(1)] = placement(key(7))
    published.update(is_exact=True)
    assert reader.find(published.name, TERM, key(0) + key(1)) == placement(key(0)) + placement(key(7))
    published.changes[key(1)] = b""
    published.update(is_exact=True)
    assert reader.find(published.name, TERM, key(0) + key(1)) is None, "there are several: the server says which"
    assert reader.find(published.name, TERM, key(0)) == placement(key(0))
    assert reader.run(published.name, TERM, key(0) + key(1)) == 2


def test_it_grows_and_its_readers_follow(published: PublishedIndex, runtime: RuntimeDir, reader: IndexReader) -> None:
    publish(published, {key(0): True})
    assert reader.run(published.name, TERM, key(0)) == 1
    for first in range(0, 20_000, 1000):
        publish(published, {key(name): True for name in range(first, first + 1000)})
        assert reader.run(published.name, TERM, b"".join(map(key, range(first + 1001)))) == first + 1000
    assert files(runtime) == [published.name, f"{published.name}.new"], "it is crowded"
    assert os.path.getsize(runtime.path / published.name) == index_bytes(1 << 15)
    publish(published, {key(name): False for name in range(10_000)})
    publish(published, {key(name): name == 0 for name in range(10_000)})
    assert files(runtime) == [published.name], "it was replaced while there was room"
    assert os.path.getsize(runtime.path / published.name) == index_bytes(1 << 16)
    assert [reader.run(published.name, TERM, key(name)) for name in (0, 1, 9_999, 10_000, 19_999)] == [1, 0, 0, 1, 1]


def test_keys_that_come_and_go_do_not_make_it_grow(
    published: PublishedIndex, runtime: RuntimeDir, reader: IndexReader
) -> None:
    for name in range(5000):
        publish(published, {key(name): True, key(name - 4): False})
        assert reader.run(published.name, TERM, b"".join(map(key, range(max(0, name - 3), name + 1)))) == min(
            4, name + 1
        )
        assert reader.run(published.name, TERM, key(name - 4)) == 0
    assert os.path.getsize(runtime.path / published.name) == index_bytes(FEW_SLOTS)


def test_beyond_its_limit_it_ends(runtime: RuntimeDir, reader: IndexReader, caplog: pytest.LogCaptureFixture) -> None:
    index = PublishedIndex(runtime, term=TERM, max_bytes=index_bytes(64), min_slots=FEW_SLOTS)
    name = index.name
    publish(index, {key(at): True for at in range(20)})
    assert reader.run(name, TERM, key(0)) == 1
    publish(index, {key(at): True for at in range(100)})
    assert "server.shared_index allows 4160" in caplog.text
    assert index.name == "" and files(runtime) == []
    assert reader.run(name, TERM, key(0)) is None
    publish(index, {key(0): False})
    assert reader.run("", TERM, key(0)) is None


def test_a_larger_one_that_cannot_be_made_ends_it(
    small_disk: Path, reader: IndexReader, caplog: pytest.LogCaptureFixture
) -> None:
    small_disk.chmod(0o700)
    runtime = RuntimeDir(small_disk)
    index = PublishedIndex(runtime, term=TERM, max_bytes=1 << 30)
    publish(index, {key(at): True for at in range(100_000)})
    assert "No space left" in caplog.text
    assert index.name == "" and files(runtime) == []
    with pytest.raises(OSError, match="No space left"):
        PublishedIndex(runtime, term=TERM, max_bytes=1 << 30, min_slots=1 << 20)
    assert files(runtime) == []


def test_while_it_is_not_exact_it_does_not_say(published: PublishedIndex, reader: IndexReader) -> None:
    publish(published, {key(0): True})
    publish(published, {key(1): True}, is_exact=False)
    assert reader.run(published.name, TERM, key(0)) is None
    publish(published, {key(at): True for at in range(100)}, is_exact=False)
    assert reader.run(published.name, TERM, key(0)) is None, "nor does the larger one that took its place"
    publish(published, {key(0): False})
    assert reader.run(published.name, TERM, key(0)) == 0
    assert reader.run(published.name, TERM, key(1)) == 1


def test_another_term_s_or_host_s_is_not_asked(
    published: PublishedIndex, runtime: RuntimeDir, reader: IndexReader
) -> None:
    publish(published, {key(0): True})
    assert reader.run(published.name, TERM + 1, key(0)) is None
    assert reader.run("index-" + 32 * "0" + ".shm", TERM, key(0)) is None
    assert reader.run("../" + published.name, TERM, key(0)) is None
    assert reader.run("", TERM, key(0)) is None
    assert reader.run(published.name, TERM, key(0)) == 1
    with host_directory() as elsewhere:
        assert IndexReader(RuntimeDir(elsewhere)).run(published.name, TERM, key(0)) is None


@pytest.mark.parametrize("damage", [{0: b"X"}, {8: b"\x01"}, {24: b"\x11"}, {24: b"\x80"}, None])
def test_what_is_no_index_is_not_read(
    published: PublishedIndex, runtime: RuntimeDir, reader: IndexReader, damage: dict[int, bytes] | None
) -> None:
    path = runtime.path / published.name
    held = bytearray(path.read_bytes())
    for at, byte in (damage or {}).items():
        held[at : at + 1] = byte
    other = f"index-{TERM:016x}{7:016x}.shm"
    (runtime.path / other).write_bytes(held if damage else b"")
    assert reader.run(other, TERM, key(0)) is None


def test_a_closed_one_is_not_asked(runtime: RuntimeDir, reader: IndexReader) -> None:
    index = PublishedIndex(runtime, term=TERM, max_bytes=1 << 20)
    name = index.name
    publish(index, {key(0): True})
    assert reader.run(name, TERM, key(0)) == 1
    index.close()
    assert reader.run(name, TERM, key(0)) is None


def start_churning(processes: Processes, runtime: RuntimeDir) -> tuple[str, object]:
    child = processes.python(
        "-m", "tests.server.churning_index", str(runtime.path), str(TERM), FIRST.hex(), SECOND.hex()
    )
    return child.line().strip(), child


def test_one_whose_server_was_killed_is_not_asked_and_swept(
    runtime: RuntimeDir, processes: Processes, reader: IndexReader
) -> None:
    name, child = start_churning(processes, runtime)
    assert reader.run(name, TERM, MIXED) == 0
    (runtime.path / f"{name}.new").touch()  # as if it had been killed while the table grew
    assert runtime.sweep() == [f"{name}.new"], "what its owner holds stays"
    child.kill()  # type: ignore[attr-defined]
    (runtime.path / f"{name}.new").touch()
    assert reader.run(name, TERM, MIXED) is None
    assert sorted(runtime.sweep()) == [name, f"{name}.new"]
    assert reader.run(name, TERM, MIXED) is None


def test_halves_of_two_keys_never_pass_for_a_third(
    runtime: RuntimeDir, processes: Processes, reader: IndexReader
) -> None:
    name, _ = start_churning(processes, runtime)
    found = {wanted: sum(reader.run(name, TERM, wanted) or 0 for _ in range(LOOKUPS)) for wanted in (FIRST, SECOND)}
    assert min(found.values()) > 0, "each of the two is there at times"
    assert sum(reader.run(name, TERM, MIXED) or 0 for _ in range(LOOKUPS)) == 0
    assert {reader.find(name, TERM, FIRST) for _ in range(LOOKUPS)} == {b"", placement(FIRST)}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_reader_that_looks_at_a_mark_once_would_be_told_of_a_key_that_never_was(
    runtime: RuntimeDir, processes: Processes, reader: IndexReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The test above can fail: without the second look at the mark it does."""
    source = (REPOSITORY / "vcache" / "pool" / "shared_index.c").read_text()
    careless = source.replace("if (__atomic_load_n(&slot->mark, __ATOMIC_RELAXED) == before)", "if (before)")
    assert careless != source
    (tmp_path / "careless.c").write_text(careless)
    built = tmp_path / "careless.so"
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", built, tmp_path / "careless.c"], check=True)
    index_run = ctypes.CDLL(str(built)).vcache_index_run
    index_run.argtypes, index_run.restype = shared_index.index_run.argtypes, shared_index.index_run.restype
    monkeypatch.setattr("vcache.pool.index_reader.index_run", index_run)
    name, _ = start_churning(processes, runtime)
    assert any(reader.run(name, TERM, MIXED) for _ in range(100 * LOOKUPS))


def test_sweep_that_is_held_up_ends_it(
    published: PublishedIndex, runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vcache.pool.runtime_dir.SWEEP_PATIENCE_S", 0.01)
    with runtime._sweeping(), pytest.raises(UnavailableError):
        PublishedIndex(runtime, term=TERM, max_bytes=1 << 20)
    with runtime._sweeping():
        publish(published, {key(at): True for at in range(100)})
    assert "sweep.lock has been held" in caplog.text
    assert published.name == ""
