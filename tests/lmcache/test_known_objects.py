"""What an adapter remembers: in order, in pages, and no more than its limit."""

from __future__ import annotations

from vcache_lmcache.known_objects import KnownObjects

from tests.lmcache.objects import object_key


def test_beyond_the_limit_what_was_stored_first_is_forgotten() -> None:
    known = KnownObjects(limit=2)
    a, b, c = map(object_key, "abc")
    assert known.add({a: 1, b: 2}) == {}
    assert known.add({c: 3}) == {a: 1}
    assert known.add({b: 5}) == {b: 2}, "stored anew: the old size does not count any more"
    assert known.forget([a, b]) == {b: 5} and len(known) == 1


def test_pages_go_on_where_the_last_ended_whatever_was_forgotten_meanwhile() -> None:
    known = KnownObjects()
    keys = [object_key(index, model="odd" if index % 2 else "even") for index in range(10)]
    known.add(dict.fromkeys(keys, 1))
    first, last = known.page("odd", 2, 0)
    known.forget([keys[3], keys[5]])
    second, end = known.page("odd", 2, last)
    assert [entry.key.to_object_key() for entry in first + second] == [keys[1], keys[3], keys[7], keys[9]]
    assert end == 0
