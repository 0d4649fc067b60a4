"""What was read from another host is copied into VRAM of the reader's own device, and served from there."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.conftest import NUM_BLOCKS, Worker, eventually
from tests.engine.kv import CHUNK, model_of, new_tensors, slots_of, wrong_blocks
from tests.pool.payloads import poke, until
from tests.remote.conftest import Hosts, is_stopped, until_announced
from tests.remote.test_faults import HALTING
from tests.remote.test_reading import start_worker
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine

TOKENS = list(range(4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


@pytest.fixture
def two(hosts, open_client):
    """A donor there, whose chunks are far; one of tier vram on the reader's own device here, and empty."""

    def start(**promotion: Any) -> Hosts:
        both: Hosts = hosts(promotion=promotion)
        both.donate(both.there)
        both.donate(VCacheConfig(**both.here.model_dump() | {"segment": {"tier": "vram"}}))
        until_announced(open_client(both.here, writes=False), 1)
        return both

    return start


def loaded(reader: Worker) -> int:
    """Loads all of it; every byte is compared there. How many chunks have come from the other host so far."""
    assert reader.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    return int(reader.do("stats")["client_remote_hits"])


def settled(reader: Worker) -> dict[str, Any]:
    eventually(lambda: reader.do("stats")["promotion_waiting"] == 0, "the end of promotion")
    return reader.do("stats")


@pytest.mark.parametrize(
    ("promotion", "needed"),
    [
        pytest.param({"policy": "first_hit"}, 1, id="first"),
        pytest.param({"policy": "nth_hit", "hits": 3}, 3, id="nth", marks=pytest.mark.slow),
    ],
)
def test_what_was_read_from_another_host_is_then_served_from_the_own_device(two, processes, promotion, needed):
    both = two(**promotion)
    writer, reader = start_worker(processes, both.there), start_worker(processes, both.here)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    for times in range(1, needed):
        assert loaded(reader) == 4 * times
        assert settled(reader)["promoted_to_vram"] == 0
    loaded(reader)
    after = settled(reader)
    assert after["promoted_to_vram"] == 4
    from_afar = after["client_remote_hits"]
    assert from_afar == 4 * needed + 4, "promotion itself reads them once more"
    assert [loaded(reader) for _ in range(3)] == [from_afar] * 3
    assert settled(reader)["promoted_to_vram"] == 4
    assert writer.do("retrieve", tokens=TOKENS, blocks=THERE) == {"loaded": 32, "wrong": []}
    assert writer.do("stats")["client_remote_hits"] == 0, "each host has its own"


# --- the source changes meanwhile --------------------------------------------------------------------------------------


def retrieve(engine: VCacheEngine) -> int:
    """How many tokens came back; every byte is compared, of the blocks left alone too."""
    tensors = new_tensors(NUM_BLOCKS)
    got = engine.retrieve(TOKENS, kvcaches=tensors, slot_mapping=slots_of(THERE)).tolist()
    assert wrong_blocks(tensors, TOKENS, THERE, got) == []
    return sum(got)


def test_a_source_overwritten_while_it_is_promoted_is_not_committed(two, processes, open_client, monkeypatch):
    """Between the payloads' way over the network and their records'."""
    monkeypatch.setattr("vcache.remote.reader.READING_MODULE", HALTING)
    both = two()
    writer, beside = start_worker(processes, both.there), open_client(both.there)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    with VCacheEngine(both.here, model=model_of()) as engine, ThreadPoolExecutor(1) as pool:

        def reading_process() -> int:
            pid: int = engine._client.mappings.remote.reader._companion.pid
            return pid

        def until_halted() -> None:
            until(
                lambda: engine._client.mappings.remote.reader._companion is not None and is_stopped(reading_process()),
                "payloads read, records not yet",
            )

        first = pool.submit(retrieve, engine)
        until_halted()
        os.kill(reading_process(), signal.SIGCONT)
        assert first.result(60) == 32
        until_halted()  # this is promotion's read
        for row in beside.acquire(b"".join(engine.keys_of(TOKENS)), 0).placements:
            use = beside.use_segment(beside.session.info(int(row["segment"])))
            assert use.segment.retire(int(row["record"]), int(row["generation"]))  # as if its lease had run out
            poke(use.segment, int(row["offset"]), bytes(int(row["nbytes"])))
            use.release()
        os.kill(reading_process(), signal.SIGCONT)
        eventually(lambda: engine.get_stats()["promotion_waiting"] == 0, "the end of promotion")
        stats = engine.get_stats()
        assert (stats["promoted_to_vram"], stats["promotion_lost"]) == (0, 4)
        assert stats["pool_vram_used_bytes"] == 0
        eventually(lambda: engine.get_stats()["server_reservations"] == 0, "what was reserved is given back")


@pytest.mark.slow
def test_a_source_removed_while_it_is_promoted_leaves_no_copy(two, processes, monkeypatch):
    """Between the copy and its commit."""
    from vcache import moving_up

    both = two()
    writer = start_worker(processes, both.there)
    assert writer.do("store", tokens=TOKENS, blocks=HERE) == {"stored": 4}
    removed: list[Future[int]] = []
    with VCacheEngine(both.here, model=model_of()) as engine, ThreadPoolExecutor(1) as pool:
        copy = moving_up._copy

        def copy_and_remove(read, write, nbytes):
            copy(read, write, nbytes)
            removed.append(pool.submit(engine.clear))  # answered once the copy, too, is gone from memory
            until(lambda: engine.lookup(TOKENS) == 0, "the removal is under way")

        monkeypatch.setattr(moving_up, "_copy", copy_and_remove)
        assert retrieve(engine) == 32
        eventually(lambda: engine.get_stats()["promotion_waiting"] == 0, "the end of promotion")
        assert [each.result(60) for each in removed] == [4]
        stats = engine.get_stats()
        assert (stats["server_entries"], stats["server_reservations"], stats["pool_vram_used_bytes"]) == (0, 0, 0)
        assert retrieve(engine) == 0
