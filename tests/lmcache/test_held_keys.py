"""Locks as leases: a batch's lease ends with the last of its keys, once per lock."""

from __future__ import annotations

from vcache_lmcache.held_keys import HeldKeys

from vcache.keys import ChunkKey

A, B, C = (ChunkKey(bytes([number]) * 16) for number in range(3))


def test_a_lease_ends_when_the_last_of_its_keys_is_let_go() -> None:
    ended: list[int] = []
    held = HeldKeys(ended.append)
    held.hold([A, B], 7, 60)
    assert held.let_go([A]) == 1 and not ended
    assert held.let_go([A, C]) == 0 and not ended
    assert held.let_go([B]) == 1 and ended == [7]
    assert len(held) == 0


def test_a_key_that_two_lookups_locked_is_held_until_both_let_go() -> None:
    ended: list[int] = []
    held = HeldKeys(ended.append)
    held.hold([A], 7, 60)
    held.hold([A, B], 8, 60)
    held.let_go([A, B])
    assert ended == [7] and len(held) == 1
    held.let_go([A])
    assert ended == [7, 8]


def test_what_is_never_let_go_is_forgotten_when_its_lease_ran_out() -> None:
    now = 0.0
    ended: list[int] = []
    held = HeldKeys(ended.append, clock=lambda: now)
    held.hold([A, B], 7, 60)
    now = 30.0
    held.hold([B], 8, 60)
    now = 61.0
    assert len(held) == 1
    assert held.let_go([A]) == 0 and held.let_go([B]) == 1
    assert ended == [8], "the server has ended the first itself"


def test_leases_that_were_not_given_hold_nothing_and_the_end_ends_all() -> None:
    ended: list[int] = []
    held = HeldKeys(ended.append)
    held.hold([A], 0, 60)
    held.hold([B, C], 9, 60)
    held.let_go([B])
    held.let_go_all()
    assert ended == [9] and len(held) == 0
