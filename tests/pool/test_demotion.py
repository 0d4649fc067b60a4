"""Demotion with real donors, segments and servers: what is pushed out of a tier is found, whole, in the one below."""

from __future__ import annotations

import pytest

from tests.pool.conftest import QUICK
from tests.pool.payloads import NBYTES, load, new_keys, store, until, until_serving
from tests.pool.stopping_donor import STEPS
from tests.pool.test_faults_server import churn, running
from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.store import Got, Shard, open_store

MIB = 1 << 20
SERVER = {**QUICK["server"], "eviction": {"high_watermark": 0.7, "low_watermark": 0.5, "demotion_timeout": 20.0}}


@pytest.fixture
def tiered(request, start_server) -> VCacheConfig:
    """Demotion begins early, with time enough for a busy machine. A parameter: more settings of the server."""
    config: VCacheConfig
    config, _ = start_server(**{**QUICK, "server": SERVER | getattr(request, "param", {})})
    return config


def with_tier(config: VCacheConfig, tier: str, **settings) -> VCacheConfig:
    return VCacheConfig(
        runtime_dir=config.runtime_dir, server=SERVER, client=QUICK["client"], segment={"tier": tier}, **settings
    )


@pytest.fixture
def donate(tiered, processes):
    """Starts ``vcache donate`` as a process, with a tier and a size."""

    def start(tier: str, size: str, *, config: VCacheConfig = tiered):
        child = processes.python(
            "-m", "vcache.cli", "donate", "--device", "cpu:0", "--tier", tier, "--size", size, config=config
        )
        child.expect("donating")
        return child

    return start


def counted(client: PoolClient, name: str) -> int:
    stats = client.stats()
    return stats.counters[name] if stats is not None else 0


def fill(client: PoolClient, chains: int, length: int = 4) -> list[list[ChunkKey]]:
    """Stores chains of chunks, each as soon as there is room for it."""
    stored = []
    for _ in range(chains):
        keys = new_keys(length)
        until(lambda: store(client, keys) == 0 and client.lookup(b"".join(keys)).hits == length, "room")  # noqa: B023
        stored.append(keys)
    return stored


def tiers_of(client: PoolClient, keys: list[ChunkKey]) -> list[str]:
    """The tier that each chunk would be read from."""
    acquired = client.acquire(b"".join(keys), 0)
    assert acquired is not None
    client.release(acquired.lease)
    return [acquired.infos[row["segment"]].tier.name.lower() for row in acquired.placements]


def test_what_vram_has_no_room_for_is_found_in_host_memory(tiered, donate, open_client):
    donors = [donate("vram", "2MiB"), donate("dram", "32MiB")]
    client, reader = open_client(tiered), open_client(tiered, writes=False)
    chains = fill(client, 20)
    until(lambda: counted(client, "demoted") >= 8, "some are demoted")
    assert [load(reader, keys) for keys in chains] == [4] * 20
    assert counted(client, "evicted") == counted(client, "demotion_timed_out") == 0
    assert {tier for keys in chains for tier in tiers_of(reader, keys)} == {"vram", "dram"}
    assert tiers_of(reader, chains[0])[-1] == "dram", "the oldest leaf went first"
    for donor in donors:
        with open(f"/proc/{donor.pid}/maps") as maps:
            assert "libtorch" not in maps.read(), "host memory is copied without torch"


@pytest.mark.parametrize(
    "tiered", [{"shared_index": 0}], indirect=True
)  # with hints what has just moved is a miss, once
def test_who_has_a_lease_finds_whole_chunks_while_they_are_demoted(tiered, donate, open_client):
    donate("vram", "2MiB")
    donate("dram", "32MiB")
    first, second, third = (open_client(tiered) for _ in range(3))
    chunks: list = []
    counts = [{"seed": seed, "stored": 0, "read": 0} for seed in range(2)]
    kept = fill(third, 2)
    with running(churn(first, chunks, counts[0]), churn(second, chunks, counts[1])):
        until(lambda: counted(third, "demoted") > 30, "they are demoted")
        for _ in range(50):
            assert [load(third, keys) for keys in kept] == [4, 4], "never a miss while it goes down"
    assert all(count["read"] > 0 for count in counts)


@pytest.mark.parametrize("step", STEPS)
def test_a_donor_killed_during_a_demotion_leaves_a_valid_copy_or_none(
    tiered, donate, processes, open_client, open_donor, step
):
    below = open_donor(with_tier(tiered, "dram"), size=8 * MIB)
    dying = processes.python("-m", "tests.pool.stopping_donor", step, "2MiB", config=tiered)
    dying.expect("donating")
    client = open_client(tiered)
    keys: list[ChunkKey] = []

    def is_dead() -> bool:
        keys.extend(new_keys(1))
        store(client, keys[-1:])
        return not dying.running

    until(is_dead, "it demotes")
    until(lambda: (stats := client.stats()) and len(stats.segments) == 1, "its segment is gone")
    until(lambda: (stats := client.stats()) and not stats.reservations, "what it had reserved is given back")
    left = [key for key in keys if load(client, [key])]  # every byte is checked
    if step == "told":
        assert left, "the copies live on"
    until(lambda: len(list(below.segment.scan())) == len(left), "memory agrees")
    below.segment.check_integrity()


def test_a_server_killed_while_chunks_are_demoted_finds_them_all_again(runtime_dir, processes, open_client, open_donor):
    config = VCacheConfig(runtime_dir=str(runtime_dir), server=SERVER, client=QUICK["client"])
    server = processes.server(config)
    upper_client = open_client(config)
    upper = open_donor(with_tier(config, "vram"), upper_client, size=2 * MIB)
    below = open_donor(with_tier(config, "dram"), size=32 * MIB)
    client = open_client(config)
    chains = fill(client, 6)
    for _ in range(3):
        term = client.term
        server.kill()
        server = processes.server(config)
        until(lambda before=term: client.term > before and upper.registered and below.registered, "all are back")
        until_serving(client)
        chains += fill(client, 4)
    until(lambda: counted(client, "demoted") > 0, "it goes on")
    assert [load(client, keys) for keys in chains] == [4] * len(chains)
    for donor in (upper, below):
        until(lambda: (stats := client.stats()) and not stats.reservations, "all is settled")
        donor.segment.check_integrity()


def test_full_host_memory_loses_its_oldest(tiered, donate, open_client):
    donate("vram", "2MiB")
    donate("dram", "2MiB")
    client = open_client(tiered)
    chains = fill(client, 40, length=2)
    until(lambda: counted(client, "demoted") >= 10 and counted(client, "evicted") >= 10, "both tiers move on")
    assert load(client, chains[0]) == 0
    assert load(client, chains[-1]) == 2
    assert [load(client, keys) in (0, 1, 2) for keys in chains] == [True] * 40


def test_what_host_memory_has_no_room_for_is_found_in_the_store(tiered, donate, open_client, tmp_path):
    settings = {"write_policy": "evicted", "staging_size": 2 * MIB, "files": {"directory": str(tmp_path / "store")}}
    spilling = with_tier(tiered, "auto", store=settings)
    donate("vram", "2MiB")
    donate("dram", "2MiB", config=spilling)
    client = open_client(tiered)
    chains = fill(client, 30, length=2)
    until(lambda: counted(client, "spilled") >= 10, "the oldest are in the store")
    below = open_store(spilling.store)
    assert below is not None
    try:
        for keys in chains:
            in_pool = load(client, keys)
            loaded = below.load([Shard(key, 0) for key in keys[in_pool:]], [NBYTES] * (2 - in_pool))
            with loaded:
                assert loaded.results == [Got.LOADED] * (2 - in_pool), "in one place or the other"
    finally:
        below.close()
    assert counted(client, "demotion_failed") == counted(client, "demotion_timed_out") == 0


def test_a_store_that_is_down_costs_the_victims_and_nothing_else(tiered, donate, open_client, tmp_path):
    (tmp_path / "store").write_text("no directory")
    settings = {"write_policy": "evicted", "staging_size": 2 * MIB, "files": {"directory": str(tmp_path / "store")}}
    donate("dram", "2MiB", config=with_tier(tiered, "auto", store=settings))
    client = open_client(tiered)
    chains = fill(client, 30, length=2)
    until(lambda: counted(client, "demotion_failed") > 0, "victims are dropped")
    assert counted(client, "spilled") == 0
    assert load(client, chains[-1]) == 2
