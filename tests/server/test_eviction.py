"""Eviction: leaves before prefixes, the least recently used first, nothing that is held, down to the watermarks."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.server.world import SETTINGS, Client, Donation, World, key
from vcache import protocol
from vram_metadata_server.integrity import check_integrity


def full(world: World, names: list[str], **more: Any) -> Donation:
    """A donor whose segment holds just these chunks, each a prompt of its own."""
    donation = world.donor("d", records=len(names), units=len(names), **more)
    for name in names:
        donation.donor.store([key(name)])
    return donation


def victims(world: World, count: int) -> list[str]:
    """What the policy would evict next, evicting it."""
    catalog = world.service.catalog
    (segment,) = catalog.segments.values()
    chosen = []
    for _ in range(count):
        placement = catalog.policy.choose(segment)
        if placement is None:
            break
        chosen.append(placement.entry.key.decode().strip("."))
        catalog.retire_entry(placement.entry)
    return chosen


def test_the_order_is_that_of_the_last_use() -> None:
    world = World(dataclasses.replace(SETTINGS, high_watermark=1.0, low_watermark=0.99))
    client = full(world, list("abcde")).donor
    client.hits([key("b")])
    client.acquire([key("a")], lease_s=0.001)
    client.call(protocol.Lookup, key("d"), 0.001)
    client.send(protocol.Touch, key("c"))
    world.now += 1
    world.tick()
    assert victims(world, 9) == ["e", "b", "a", "d", "c"]


def test_a_use_of_a_prompt_keeps_its_prefix_as_long_as_its_end() -> None:
    world = World()
    donation = world.donor("d", records=4, units=4)
    donation.donor.store([key("a"), key("b"), key("c")])
    donation.donor.store([key("z")])
    assert donation.donor.hits([key("a"), key("b"), key("c")]) == 3
    assert victims(world, 4) == ["z", "c", "b", "a"]


def test_held_leaves_come_up_again_when_they_are_free() -> None:
    world = World()
    client = full(world, list("abc")).donor
    reading = client.acquire([key("a")])
    assert victims(world, 9) == ["b", "c"]
    assert victims(world, 9) == []
    reading.finish()
    client.flush()
    assert victims(world, 9) == ["a"]


def test_more_held_leaves_than_are_looked_at_only_delay_the_choice() -> None:
    world = World()
    names = [f"{at:04}" for at in range(1300)]
    client = full(world, names).donor
    for name in names[:-1]:
        client.call(protocol.Pin, key(name), 1000.0)
    tries = [victims(world, 1) for _ in range(4)]
    assert [name for found in tries for name in found] == [names[-1]]


def test_eviction_stops_at_the_low_watermark_and_is_bounded_per_tick() -> None:
    world = World(dataclasses.replace(SETTINGS, high_watermark=0.9, low_watermark=0.5, eviction_batch=3))
    full(world, [f"{at:03}" for at in range(100)])
    assert world.service.counters["evicted"] == 0
    world.tick()
    assert world.service.counters["evicted"] == 3
    world.settle()
    assert 48 <= len(world.service.catalog.index) <= 52
    world.check()


def test_too_few_records_are_pressure_too() -> None:
    world = World()
    donation = world.donor("d", records=10, units=1000)
    for at in range(10):
        donation.donor.store([key(at)])
    world.settle()
    assert world.service.counters["evicted"] > 0
    assert donation.donor.store([key("new")]) == [protocol.Outcome.GRANTED]


def test_evicting_a_chunk_takes_all_its_ranks() -> None:
    world = World()
    first, second = world.donor("a", device="cuda:0"), world.donor("b", device="cuda:1", records=2, units=2)
    for name in ("x", "y"):
        first.donor.store([key(name)], rank=0, ranks=2)
        second.donor.store([key(name)], rank=1, ranks=2)
    world.settle()
    left = [len([r for r in donation.memory.records if r.generation]) for donation in (first, second)]
    assert left == [1, 1], "the pressure is on the second segment only"
    world.check()


def test_room_is_made_for_a_large_payload_in_a_fragmented_segment() -> None:
    world = World()
    donation = full(world, [f"{at:03}" for at in range(40)])
    client = donation.donor
    outcome: list[protocol.Outcome] = []
    for _ in range(60):
        outcome = client.store([key("large")], units=8)
        world.settle()
        if outcome != [protocol.Outcome.NO_SPACE]:
            break
    assert outcome == [protocol.Outcome.GRANTED]


class Forest:
    """What the policy must do, said simply: always the leaf whose last use is longest ago."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.parent: dict[str, str] = {}
        self.time = 0

    def use(self, names: list[str]) -> None:
        self.time += 1
        for name in names:
            if name in self.used:
                self.used[name] = self.time

    def evict(self) -> str | None:
        leaves = [name for name in self.used if name not in self.parent.values()]
        if not leaves:
            return None
        name = min(leaves, key=lambda leaf: self.used[leaf])
        del self.used[name], self.parent[name]
        return name


@given(
    st.lists(st.tuples(st.sampled_from(["store", "use", "evict"]), st.integers(0, 3), st.integers(1, 5)), max_size=40)
)
def test_the_policy_agrees_with_its_plain_description(steps: list[tuple[str, int, int]]) -> None:
    world, model = World(dataclasses.replace(SETTINGS, high_watermark=1.0, low_watermark=0.99)), Forest()
    client = world.donor("d", records=64, units=64).donor
    for step, prompt, length in steps:
        names = [f"{prompt}{at}" for at in range(length)]
        if step == "store":
            client.store([key(name) for name in names])
            for at, name in enumerate(names):
                if name not in model.used:
                    model.time += 1
                    model.used[name] = model.time
                    model.parent[name] = names[at - 1] if at else ""
        elif step == "use":
            client.send(protocol.Touch, b"".join(key(name) for name in names))
            model.use(names)
        else:
            expected = model.evict()
            assert victims(world, 1) == ([expected] if expected else [])
    check_integrity(world.service)


def test_a_reader_elsewhere_protects_what_it_reads() -> None:
    world = World()
    client = full(world, list("ab")).donor
    reader = Client(world, "r", writes=False)
    reading = reader.acquire([key("a")])
    client.reserve([key("c")])
    world.settle()
    assert reading.finish() == [True]
