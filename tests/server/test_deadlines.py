"""Deadlines, leases and pins: what ends when, and that nothing makes the books grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.server.world import key
from vram_metadata_server.deadlines import Deadlines, Expiries
from vram_metadata_server.index import Entry
from vram_metadata_server.leases import LeaseTable
from vram_metadata_server.pins import PinTable

SESSION, OTHER = b"s" * 16, b"o" * 16


def entry(name: str = "a") -> Entry:
    return Entry(key(name), b"", 0, (None,), 1, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(1, 50)))), st.integers(0, 60))
def test_each_name_is_due_once_at_the_last_deadline_it_was_given(moves: list[tuple[int, int | None]], now: int) -> None:
    current: dict[int, float] = {}
    deadlines: Deadlines[int] = Deadlines(current.get)
    for name, deadline in moves:
        if deadline is None:
            current.pop(name, None)
        else:
            current[name] = deadline
            deadlines.push(deadline, name)
    due = []
    for name in deadlines.due(now):
        due.append(name)
        del current[name]
    assert sorted(due) == sorted({name for name, _ in moves} - set(current) - _called_off(moves))
    assert all(deadline > now for deadline in current.values())


def _called_off(moves: list[tuple[int, int | None]]) -> set[int]:
    last = dict(moves)
    return {name for name, deadline in last.items() if deadline is None}


def test_moving_a_deadline_a_million_times_keeps_the_heap_small() -> None:
    current: dict[int, float] = {}
    deadlines: Deadlines[int] = Deadlines(current.get)
    for at in range(100_000):
        current[at % 10] = float(at)
        deadlines.push(float(at), at % 10)
    assert len(deadlines._heap) < 3000
    assert sorted(deadlines.due(1e9)) == list(range(10))


def test_expiries_forget_what_was_dropped() -> None:
    expiries = Expiries()
    expiries.set(b"a", 1.0)
    expiries.set(b"b", 2.0)
    expiries.set(b"a", 3.0)
    expiries.drop(b"b")
    assert list(expiries.due(2.5)) == [] and b"a" in expiries
    assert list(expiries.due(3.0)) == [b"a"] and len(expiries) == 0


def test_a_lease_holds_its_run_until_release_deadline_or_the_sessions_end() -> None:
    table, chunk = LeaseTable(first_id=10), entry()
    ids = [table.grant(SESSION, [chunk], b"", deadline) for deadline in (1.0, 5.0, 9.0)]
    table.grant(OTHER, [chunk], b"", 5.0)
    assert chunk.holds == 4 and table.oldest_id == ids[0] == 10
    assert table.release(OTHER, ids[1]) is None
    assert table.release(SESSION, ids[1]) is not None and table.release(SESSION, ids[1]) is None
    table.check_integrity(0.5)
    assert table.expire(1.0) == 1
    assert table.release_all(SESSION) == 1
    assert chunk.holds == 1 == len(table)
    table.check_integrity(2.0)
    assert table.expire(99.0) == 1 and table.oldest_id == table.next_id


def test_a_session_may_lease_only_so_many_keys() -> None:
    table, chunk = LeaseTable(first_id=1), entry()
    run = [chunk] * 16_384
    granted = [table.grant(SESSION, run, b"", 1.0) for _ in range(70)]
    assert sum(map(bool, granted)) == 64
    assert table.grant(OTHER, run, b"", 1.0)
    table.expire(1.0)
    assert chunk.holds == 0 and table.grant(SESSION, run, b"", 2.0)


def test_a_pin_lasts_until_its_latest_deadline() -> None:
    pins, chunk = PinTable(), entry()
    assert pins.pin(chunk, 2.0) and pins.pin(chunk, 5.0) and pins.pin(chunk, 3.0)
    assert chunk.holds == 1 == len(pins)
    assert pins.expire(4.0) == 0
    pins.check_integrity(4.0)
    assert pins.expire(5.0) == 1 and chunk.holds == 0
    assert not pins.unpin(chunk.key)


def test_a_pin_after_the_chunk_was_removed_and_stored_again_holds_the_new_entry() -> None:
    pins, old, new = PinTable(), entry(), entry()
    pins.pin(old, 5.0)
    pins.pin(new, 2.0)
    assert (old.holds, new.holds) == (0, 1)
    assert pins.expire(2.0) == 1 and new.holds == 0
    assert pins.pin(new, 9.0) and pins.unpin(new.key) and new.holds == 0
