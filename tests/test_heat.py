"""Heat counts hits, and forgets what was hit longest ago."""

from __future__ import annotations

from vcache.heat import Heat
from vcache.keys import ChunkKey

KEYS = [ChunkKey(bytes([number]) * 16) for number in range(4)]


def test_each_key_is_counted_for_itself():
    heat = Heat()
    assert heat.hit(KEYS[:2]) == [1, 1]
    assert heat.hit(KEYS[1:3]) == [2, 1]


def test_what_was_hit_longest_ago_is_forgotten_first():
    heat = Heat(remembered=3)
    heat.hit(KEYS[:3])
    heat.hit(KEYS[:1])
    heat.hit(KEYS[3:])
    assert heat.hit([KEYS[0], KEYS[2], KEYS[1]]) == [3, 2, 1]
