"""The index: runs, shards, copies, and who is whose child."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.world import key
from vcache.protocol import PLACEMENT, SegmentInfo, Tier
from vram_metadata_server.index import Entry, Index, Placement, split_keys
from vram_metadata_server.refusal import RefusalError
from vram_metadata_server.segments import Segment


@pytest.fixture
def segment() -> Segment:
    info = SegmentInfo(7, bytes(16), 1, Tier.DRAM, bytes(16), "cpu:0", 1 << 20, b"", "")
    return Segment(info, donor=bytes(16), data_offset=4096, record_count=64, waiting=set())


def add(index: Index, segment: Segment, name: str, parent: str = "", **more: Any) -> tuple[Entry, Placement]:
    entry = index.get(key(name)) or index.create(key(name), key(parent) if parent else b"", 0, more.get("ranks", 1))
    packed = PLACEMENT.pack(segment.number, more.get("record", 0), more.get("generation", 2), 8192, 100)
    return entry, index.add(entry, segment, more.get("rank", 0), packed)


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 2000])
def test_keys_are_split_in_order(count: int) -> None:
    names = [key(at) for at in range(count)]
    assert list(split_keys(b"".join(names))) == names


def test_a_blob_that_is_no_whole_number_of_keys_is_refused() -> None:
    with pytest.raises(RefusalError, match="17 bytes"):
        split_keys(bytes(17))


def test_a_run_ends_before_the_first_chunk_that_is_not_whole(segment: Segment) -> None:
    index = Index()
    for name in "abd":
        add(index, segment, name)
    add(index, segment, "c", ranks=2)
    names = [key(name) for name in "abcd"]
    assert [entry.key for entry in index.run(names)] == names[:2]
    assert index.count(names) == 2
    assert index.count(names[2:]) == 0 and index.run(names[2:]) == []
    add(index, segment, "c", rank=1)
    assert len(index.run(names)) == 4 == index.count(names)


def test_a_run_follows_the_prompt_that_is_asked_for_where_several_go_on_from_a_chunk(segment: Segment) -> None:
    index = Index()
    for name, parent in (("a", ""), ("b", "a"), ("c", "b"), ("x", "a"), ("y", "x")):
        add(index, segment, name, parent)
    for prompt in ("abc", "axy", "ab", "ax", "xy", "ac", "by"):
        names = [key(name) for name in prompt]
        assert [entry.key for entry in index.run(names)] == names


def test_a_run_ends_before_a_chunk_that_has_gone_and_finds_it_when_it_is_back(segment: Segment) -> None:
    index = Index()
    add(index, segment, "a")
    _, first = add(index, segment, "b", "a")
    add(index, segment, "c", "b")
    names = [key(name) for name in "abc"]
    index.discard(first)
    assert [entry.key for entry in index.run(names)] == names[:1]
    back, _ = add(index, segment, "b", "a")
    found = index.run(names)
    assert [entry.key for entry in found] == names and found[1] is back


def test_a_placement_says_where_it_lies(segment: Segment) -> None:
    _, placement = add(Index(), segment, "a", record=5, generation=(1 << 60) + 8)
    assert (placement.record, placement.generation, placement.extent) == (5, (1 << 60) + 8, (8192, 100))


def test_losing_a_rank_makes_a_chunk_incomplete_losing_all_removes_it(segment: Segment) -> None:
    index = Index()
    _, first = add(index, segment, "a", rank=0, ranks=2)
    entry, second = add(index, segment, "a", rank=1)
    assert entry.missing == 0
    index.discard(first)
    assert index.whole == {} and index.partial == {key("a"): entry} and entry.packed == b""
    index.discard(second)
    assert len(index) == 0


def test_copies_of_a_shard_come_and_go_in_any_order(segment: Segment) -> None:
    for at in range(3):
        index = Index()
        placements = [add(index, segment, "a", record=record)[1] for record in range(3)]
        entry = placements[0].entry
        assert list(entry.placements()) == placements[::-1] and entry.packed == b""
        index.discard(placements[at])
        left = [placement for placement in placements if placement is not placements[at]]
        assert list(entry.placements()) == left[::-1]
        assert entry.packed == b"", "an acquire has a choice to make"
        for placement in left:
            index.discard(placement)
        assert len(index) == 0


def test_children_are_counted_also_before_and_after_their_parent(segment: Segment) -> None:
    index = Index()
    add(index, segment, "b", parent="a")
    index.add_child(key("a"))  # a reservation
    assert index.orphans == {key("a"): 2}
    parent, placement = add(index, segment, "a")
    assert parent.children == 2 and index.orphans == {}
    assert index.drop_child(key("a")) is None
    index.discard(placement)
    assert index.orphans == {key("a"): 1}
    parent, _ = add(index, segment, "a")
    assert index.discard(index.whole[key("b")].shards[0]) is parent, "the parent is a leaf now"  # type: ignore[arg-type]
    assert index.drop_child(b"") is None


def test_children_share_their_parents_key_object(segment: Segment) -> None:
    index = Index()
    parent, _ = add(index, segment, "a")
    child, _ = add(index, segment, "b", parent="a")
    assert child.parent is parent.key
