"""What is loaded from the store enters the pool, what is loaded from host memory is copied to VRAM; behind everybody's back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine.conftest import NUM_BLOCKS, eventually, serving_segments
from tests.engine.kv import BLOCK, CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.promotion import PROMOTION_VALUES
from vcache.store.files import FileStore

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
PAYLOAD = 2 * 256 * 3


@pytest.fixture
def configured(pool: VCacheConfig, tmp_path: Path) -> Callable[..., VCacheConfig]:
    """The test's pool with a directory below it."""

    def configure(policy: str = "first_hit", store: dict | None = None, **promotion) -> VCacheConfig:
        return VCacheConfig(
            runtime_dir=pool.runtime_dir,
            store={"files": {"directory": str(tmp_path / "store")}, **(store or {})},
            promotion={"policy": policy, **promotion},
            client={"call_timeout": "20s"},
        )

    return configure


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Open until the test closes it: reads that promotion makes from a directory wait before it, no others."""
    event, get_into = threading.Event(), FileStore.get_into
    event.set()

    def wait_first(self, shards, buffers, *arrived):
        if "write" in threading.current_thread().name:  # the threads of what nobody waits for
            event.wait()
        return get_into(self, shards, buffers, *arrived)

    monkeypatch.setattr(FileStore, "get_into", wait_first)
    yield event
    event.set()


def store(engine: VCacheEngine, tokens=TOKENS, *, rank: int = 0, salt: str = "") -> None:
    tensors = new_tensors(NUM_BLOCKS)
    blocks = HERE[: len(tokens) // BLOCK]
    fill(tensors, tokens, blocks, rank=rank, salt=salt)
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks), salt=salt)
    assert engine.flush()


def store_below(engine: VCacheEngine, **options) -> None:
    """Afterwards the store alone has them."""
    store(engine, **options)
    assert engine.clear() == 4


def retrieve(engine: VCacheEngine, tokens=TOKENS, *, rank: int = 0, salt: str = "") -> int:
    """How many tokens came back; every byte is compared, of the blocks left alone too."""
    tensors, blocks = new_tensors(NUM_BLOCKS), THERE[: len(tokens) // BLOCK]
    loaded = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks), salt=salt).tolist()
    assert wrong_blocks(tensors, tokens, blocks, loaded, rank=rank, salt=salt) == []
    return sum(loaded)


def settled(engine: VCacheEngine) -> dict[str, int]:
    """The figures of promotion once nothing waits; they must add up."""
    eventually(lambda: engine.get_stats()["promotion_waiting"] == 0, "the end of promotion")
    stats = {name: int(engine.get_stats()[name]) for name in PROMOTION_VALUES}
    offered = stats.pop("promotion_offered")
    assert offered == sum(stats.values())
    return {name: count for name, count in stats.items() if count}


# --- from the store into the pool --------------------------------------------------------------------------------------


def test_what_was_loaded_from_the_store_enters_the_pool(configured, open_engine):
    engine = open_engine(configured())
    store_below(engine)
    assert retrieve(engine) == 32
    assert settled(engine) == {"promoted_from_store": 4}
    other = open_engine(configured("never"))
    assert other.lookup_keys(other.keys_of(TOKENS))[:2] == (4, 0)
    assert retrieve(other) == 32
    assert other.get_stats()["store_hits"] == 0


def test_the_policy_never_leaves_everything_where_it_is(configured, open_engine):
    engine = open_engine(configured("never"))
    store_below(engine)
    assert retrieve(engine) == 32
    assert settled(engine) == {}
    assert engine.lookup_keys(engine.keys_of(TOKENS))[:2] == (0, 4)


def test_the_nth_hit_promotes_and_the_hits_of_a_longer_prompt_count_chunk_by_chunk(configured, open_engine):
    engine = open_engine(configured("nth_hit", hits=3))
    store_below(engine)
    assert [retrieve(engine, TOKENS[:16]) for _ in range(2)] == [16, 16]
    assert settled(engine) == {}
    assert retrieve(engine) == 32
    assert settled(engine) == {"promoted_from_store": 2}
    assert engine.lookup_keys(engine.keys_of(TOKENS))[:2] == (2, 2)


def test_promoted_chunks_belong_to_their_tenant_and_their_prefix(configured, open_engine):
    engine = open_engine(configured())
    store_below(engine, salt="one")
    tensors = new_tensors(NUM_BLOCKS)
    engine.register_kv_caches(tensors)
    keys = engine.keys_of(TOKENS, salt="one")
    assert engine.begin_retrieve(keys[2:], [THERE[4:6], THERE[6:]], keys[1], salt="one").complete() == 2
    assert settled(engine) == {"promoted_from_store": 2}
    assert [engine.contains(key) for key in keys] == [1, 1, 0, 0]
    assert engine.clear(salt="") == 0
    assert engine.clear(salt="one") == 2


def test_each_rank_promotes_its_own_part(configured, open_engine):
    model = model_of(ranks=2)
    ranks = [open_engine(configured(), model=model, rank=rank) for rank in range(2)]
    for rank, engine in enumerate(ranks):
        store(engine, rank=rank)
    ranks[0].clear()
    assert retrieve(ranks[0], rank=0) == 32
    assert settled(ranks[0]) == {"promoted_from_store": 4}
    assert ranks[0].lookup_keys(ranks[0].keys_of(TOKENS))[:2] == (0, 4)
    assert retrieve(ranks[1], rank=1) == 32
    assert settled(ranks[1]) == {"promoted_from_store": 4}
    assert ranks[0].lookup_keys(ranks[0].keys_of(TOKENS))[:2] == (4, 0)
    assert [retrieve(engine, rank=rank) for rank, engine in enumerate(ranks)] == [32, 32]
    assert [engine.get_stats()["store_hits"] for engine in ranks] == [4, 4]


def test_a_load_does_not_wait_for_promotion_and_a_full_queue_drops(configured, open_engine, gate):
    engine = open_engine(configured(queue_items=2))
    store_below(engine)
    gate.clear()
    assert retrieve(engine) == 32
    assert retrieve(engine) == 32
    stats = engine.get_stats()
    assert stats["promotion_dropped"] >= 2
    assert stats["promotion_waiting"] <= 2
    gate.set()
    assert settled(engine)["promotion_dropped"] >= 2
    assert retrieve(engine) == 32


def test_a_pool_without_room_is_left_as_it_is_and_the_store_goes_on_serving(
    start_server, start_donor, open_engine, tmp_path, runtime_dir
):
    """One donor whose segment has no room for a chunk of this model; another model's fits."""
    config, _ = start_server(
        store={"files": {"directory": str(tmp_path / "store")}}, segment={"records": 64}, client={"call_timeout": "5s"}
    )
    start_donor(config, size="1MiB")
    engine = open_engine(config)
    chunks, at_once = 200, 40  # of the latter a segment with 64 records has room for one
    tensors = new_tensors(2 * chunks)
    engine.register_kv_caches(tensors)
    tokens, blocks = list(range(chunks * CHUNK)), list(range(2 * chunks))
    fill(tensors, tokens, blocks)
    keys, table = engine.keys_of(tokens), [blocks[2 * chunk : 2 * chunk + 2] for chunk in range(chunks)]
    for start in range(0, chunks, at_once):
        part = slice(start, start + at_once)
        assert engine.begin_store(keys[part], table[part], keys[start - 1] if start else None).complete() == at_once
        assert engine.flush()
        assert engine.clear() == at_once
    for _ in range(2):
        loaded = new_tensors(2 * chunks)
        got = engine.retrieve(tokens, kvcaches=loaded, slot_mapping=slots_of(blocks)).tolist()
        assert sum(got) == len(tokens)
        assert wrong_blocks(loaded, tokens, blocks, got) == []
        figures = settled(engine)
    assert figures["promoted_from_store"] > 0
    assert figures["promotion_no_space"] > 0


@pytest.mark.parametrize("failure", [OSError("gone"), MemoryError("none left")])
def test_a_promotion_that_fails_hurts_nothing(configured, open_engine, monkeypatch, failure):
    engine = open_engine(configured(store={"guard": {"failures": 1000}}))
    store_below(engine)
    get_into = FileStore.get_into

    def fail_behind(self, shards, buffers, *arrived):
        if "write" in threading.current_thread().name:
            raise failure
        return get_into(self, shards, buffers, *arrived)

    monkeypatch.setattr(FileStore, "get_into", fail_behind)
    assert [retrieve(engine) for _ in range(2)] == [32, 32]
    assert settled(engine)["promotion_lost"] >= 4
    stats = engine.get_stats()
    assert (stats["server_reservations"], stats["server_entries"]) == (0, 0)
    monkeypatch.undo()
    assert retrieve(engine) == 32
    assert settled(engine)["promoted_from_store"] == 4


def test_a_file_that_goes_bad_after_its_load_is_not_promoted(configured, open_engine, gate, tmp_path):
    engine = open_engine(configured())
    store_below(engine)
    gate.clear()
    assert retrieve(engine) == 32
    (file,) = (tmp_path / "store").rglob(f"{engine.keys_of(TOKENS)[2].hex()}*.kv")
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\xff")
    gate.set()
    assert settled(engine) == {"promoted_from_store": 2, "promotion_lost": 2}
    assert not file.exists()
    assert retrieve(engine) == 16
    stats = engine.get_stats()
    assert (stats["server_reservations"], stats["server_entries"]) == (0, 2)


def test_what_is_removed_meanwhile_does_not_come_back(configured, open_engine, gate):
    engine = open_engine(configured())
    store_below(engine)
    gate.clear()
    assert retrieve(engine) == 32
    threading.Timer(0.2, gate.set).start()
    assert engine.remove_keys(engine.keys_of(TOKENS)) == 0
    settled(engine)
    assert engine.lookup(TOKENS) == 0


def test_closing_does_not_wait_for_what_is_queued(configured, open_engine, gate):
    engine = open_engine(configured())
    store_below(engine, salt="closing")  # of chunks that are being moved at the end the keys stay taken for a while
    gate.clear()
    assert retrieve(engine, salt="closing") == 32
    engine.close(timeout_s=0.2)
    gate.set()
    other = open_engine(configured("never"))
    assert retrieve(other, salt="closing") == 32


def test_many_load_and_promote_while_others_remove(configured, open_engine):
    """No wrong byte and no lost count, whatever meets whatever."""
    engines = [open_engine(configured()) for _ in range(2)]
    store_below(engines[0])
    stop, errors = threading.Event(), []

    def load(engine: VCacheEngine) -> None:
        try:
            while not stop.is_set():
                assert retrieve(engine) in (0, 8, 16, 24, 32)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(engine,)) for engine in engines for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        engines[0].clear()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    for engine in engines:
        settled(engine)
        assert retrieve(engine) == 32


@pytest.mark.slow
def test_a_donor_that_dies_takes_what_was_promoted_to_it_and_nothing_else(
    start_server, start_donor, open_engine, tmp_path
):
    config, _ = start_server(
        store={"files": {"directory": str(tmp_path / "store")}},
        server={"heartbeat_interval": "0.1s", "liveness_timeout": "1s"},
    )
    donor = start_donor(config)
    engine = open_engine(config)
    store_below(engine)
    assert retrieve(engine) == 32
    assert settled(engine) == {"promoted_from_store": 4}
    os.kill(donor.pid, signal.SIGKILL)
    donor.wait()
    eventually(lambda: serving_segments(config) == 0, "the loss of the segment")
    assert retrieve(engine) == 32
    assert settled(engine)["promotion_no_space"] == 4
    start_donor(config)
    assert retrieve(engine) == 32
    eventually(lambda: settled(engine)["promoted_from_store"] == 8, "promotion to the new segment")
    assert retrieve(engine) == 32


# --- from host memory into VRAM ----------------------------------------------------------------------------------------


@pytest.fixture
def two_tiers(start_server, start_donor, open_engine, device, monkeypatch) -> VCacheEngine:
    """A pool whose chunks are in a segment of tier dram, beside an empty one of tier vram on the engine's device."""
    monkeypatch.setattr(f"{__name__}.new_tensors", partial(new_tensors, device=device))
    config, _ = start_server(server={"heartbeat_interval": "100ms"})
    start_donor(config)
    engine: VCacheEngine = open_engine(config, device=device)
    store(engine)
    donor_config = VCacheConfig(**config.model_dump() | {"segment": {"tier": "vram"}})
    start_donor(donor_config, device=device)
    eventually(lambda: len(engine._client.session.infos()) == 2, "a heartbeat tells of the new segment")
    return engine


def test_what_was_loaded_from_host_memory_is_copied_to_vram_and_loaded_from_there(two_tiers):
    assert retrieve(two_tiers) == 32
    assert settled(two_tiers) == {"promoted_to_vram": 4}
    before = two_tiers.get_stats()
    assert (before["vram_read_bytes"], before["dram_read_bytes"]) == (0, 4 * PAYLOAD)
    assert before["server_entries"] == 4
    assert retrieve(two_tiers) == 32
    after = two_tiers.get_stats()
    assert (after["vram_read_bytes"], after["dram_read_bytes"]) == (4 * PAYLOAD, 4 * PAYLOAD)
    assert settled(two_tiers) == {"promoted_to_vram": 4}, "what is in VRAM is not copied there again"


def test_what_is_in_both_tiers_is_removed_from_both(two_tiers):
    assert retrieve(two_tiers) == 32
    assert settled(two_tiers) == {"promoted_to_vram": 4}
    assert two_tiers.remove_keys(two_tiers.keys_of(TOKENS)[2:]) == 2
    assert retrieve(two_tiers) == 16
    assert two_tiers.clear() == 2
    stats = two_tiers.get_stats()
    assert (stats["pool_vram_used_bytes"], stats["pool_dram_used_bytes"]) == (0, 0)


def test_a_copy_whose_source_changed_is_not_committed(two_tiers, monkeypatch):
    """The source is removed between the copy and the verdict on it."""
    from vcache import moving_up

    copy = moving_up._copy

    def copy_and_remove(read, write, nbytes):
        copy(read, write, nbytes)
        two_tiers.clear()

    monkeypatch.setattr(moving_up, "_copy", copy_and_remove)
    assert retrieve(two_tiers) == 32
    assert settled(two_tiers) == {"promotion_lost": 4}
    assert retrieve(two_tiers) == 0
    stats = two_tiers.get_stats()
    assert (stats["server_reservations"], stats["server_entries"], stats["pool_vram_used_bytes"]) == (0, 0, 0)
