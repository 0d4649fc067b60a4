"""The server dies, twice in a row and under load: reservations are nobody else's, entries come back, no byte is wrong."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.pool.payloads import NBYTES, fill, load, new_keys, start_write, store, until, until_serving

MIB = 1 << 20


def extents(write) -> set[tuple[int, int]]:
    return {(int(row["segment"]), int(row["offset"])) for row in write.placements}


@contextmanager
def running(*work: Callable[[], None]) -> Iterator[threading.Event]:
    """Repeats each piece of work in a thread of its own; fails the test when one of them failed."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def repeat(piece: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                piece()
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=repeat, args=(piece,)) for piece in work]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def churn(client, chunks: list, rounds: dict[str, int]) -> Callable[[], None]:
    """One round: store a run, read a run that anybody stored, every byte checked."""
    chooser = random.Random(rounds["seed"])

    def work() -> None:
        keys = new_keys(3)
        if store(client, keys) == 3:
            chunks.append(keys)
            rounds["stored"] += 1
        if chunks and load(client, chooser.choice(chunks)):
            rounds["read"] += 1

    return work


@pytest.mark.parametrize("when", ["marked", "copied", "committed"])
def test_reservations_in_flight_survive_a_server_killed_twice_in_a_row(quick, processes, open_client, open_donor, when):
    config, server = quick
    writer, other = open_client(config), open_client(config)
    donor = open_donor(config, size=2 * MIB)
    present, keys = new_keys(5), new_keys(6)
    assert store(writer, present) == 5
    write = start_write(writer, keys)
    assert len(write.granted) == 6
    if when != "marked":
        fill(write, keys)
    if when == "committed":
        write.commit_records()
    for _ in range(2):
        term = writer.term
        server.kill()
        server = processes.server(config)
        until(
            lambda before=term: all(it.term > before for it in (writer, other, donor)) and donor.registered,
            "all are back",
        )
    until(lambda: load(other, present) == 5, "all committed entries are back")
    until_serving(other)
    filler = new_keys(40)
    held = {(int(row["offset"])) for row in write.placements}
    granted = start_write(other, filler)
    assert len(granted.granted) > 0
    assert not held & {int(row["offset"]) for row in granted.placements}, "an extent was granted twice"
    fill(granted, filler)
    if when == "marked":
        fill(write, keys)
    granted.complete()
    if when == "committed":
        write.tell()
    write.complete()
    stored = [filler[index] for index in granted.granted.tolist()]
    assert all(load(other, [key]) in (0, 1) for key in [*keys, *stored, *present])  # every byte is checked
    until(lambda: (stats := other.stats()) and not stats.reservations, "everything is settled")
    donor.segment.check_integrity()


def test_a_server_restarted_under_load_gives_the_entries_back_and_no_wrong_byte(
    quick, processes, open_client, open_donor
):
    config, server = quick
    open_donor(config, size=16 * MIB)
    donor = open_donor(config, size=16 * MIB)
    first, second = open_client(config), open_client(config)
    chunks: list = []
    counts = [{"seed": seed, "stored": 0, "read": 0} for seed in range(2)]
    with running(churn(first, chunks, counts[0]), churn(second, chunks, counts[1])):
        for _ in range(3):
            marks = [(count["stored"], count["read"]) for count in counts]
            until(
                lambda before=marks: all(
                    count["stored"] > stored + 2 and count["read"] > read + 2
                    for count, (stored, read) in zip(counts, before, strict=True)
                ),
                "both go on storing and reading",
            )
            server.kill()
            server = processes.server(config)
            # Not by loading any of them: what is stored meanwhile evicts.
            until(lambda: (stats := first.stats()) and stats.counters["handed_over"] > 0, "the entries are back")
    until(lambda: (stats := first.stats()) and not stats.reservations and not stats.leases, "all is given back")
    until(lambda: any(load(second, keys) == 3 for keys in chunks[-20:]), "what was stored under load is there")
    donor.segment.check_integrity()
    for client in (first, second):
        assert client.counters["refused_marks"] == 0
        assert client.counters["failures"] == 0


def test_a_donor_killed_under_load_takes_its_entries_only_and_no_byte_is_wrong(
    quick, processes, open_client, open_donor, runtime_dir
):
    config, _ = quick
    survivor = open_donor(config, size=16 * MIB)
    first, second = open_client(config), open_client(config, device="cpu:1")  # what it writes goes to the doomed one
    safe = new_keys(4)
    assert store(first, safe, pin_s=600.0) == 4
    chunks: list = []
    counts = [{"seed": seed, "stored": 0, "read": 0} for seed in range(2)]
    with running(churn(first, chunks, counts[0]), churn(second, chunks, counts[1])):
        for _ in range(2):
            child = processes.python(
                "-m", "vcache.cli", "donate", "--device", "cpu:1", "--size", "32MiB", config=config
            )
            child.expect("donating")

            def is_used(client=first) -> bool:
                stats = client.stats()
                return stats is not None and any(
                    s.device == "cpu:1" and s.used_bytes > 10 * NBYTES for s in stats.segments
                )

            until(is_used, "the doomed segment is in use")
            child.kill()
            until(lambda: (stats := first.stats()) and len(stats.segments) == 1, "its entries are gone")
            assert load(first, safe) == 4
    until(lambda: len(list(runtime_dir.glob("segment-*"))) == 1, "shared memory is cleaned")
    until(lambda: len(first.mappings.mapped()) == 1, "the mapping is closed")
    until(lambda: (stats := first.stats()) and not stats.leases, "all leases are given back")
    survivor.segment.check_integrity()
