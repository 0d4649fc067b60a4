"""Lookups go on in the store where the pool's run ends; a store that fails costs its part only."""

from __future__ import annotations

import pytest
import torch

import vcache.engine
from tests.engine.kv import CHUNK, fill, new_tensors, slots_of
from vcache.store import NullStore, Shard, open_store
from vcache.store.base import Got, Put, leading_run
from vcache.store_config import StoreConfig

TOKENS = list(range(4 * CHUNK))
BLOCKS = list(range(8))


class MemoryStore:
    """A store as its interface asks for it, in a dict."""

    def __init__(self):
        self.shards, self.fails, self.closed = {}, False, 0

    def contains(self, shards):
        if self.fails:
            raise ConnectionError("the store is away")
        return [shard in self.shards for shard in shards]

    def get_into(self, shards, buffers):
        for shard, buffer in zip(shards, buffers, strict=True):
            if shard in self.shards:
                buffer.copy_(self.shards[shard])
        return [Got.LOADED if shard in self.shards else Got.ABSENT for shard in shards]

    def put_from(self, shards, buffers):
        self.shards.update({shard: buffer.clone() for shard, buffer in zip(shards, buffers, strict=True)})
        return [Put.STORED] * len(shards)

    def remove(self, shards):
        return sum(self.shards.pop(shard, None) is not None for shard in shards)

    def close(self, timeout_s=10.0):
        self.closed += 1


@pytest.fixture
def below(monkeypatch):
    store = MemoryStore()
    monkeypatch.setattr(vcache.engine, "open_store", lambda config: store)
    return store


def put(store, keys, rank=0):
    store.put_from([Shard(key, rank) for key in keys], [torch.zeros(8, dtype=torch.uint8) for _ in keys])


@pytest.fixture
def engine(pool, open_engine, below):
    engine = open_engine(pool)
    tensors = new_tensors(64)
    fill(tensors, TOKENS, BLOCKS)
    engine.store(TOKENS[:16], kvcaches=tensors, slot_mapping=slots_of(BLOCKS[:4]))
    return engine


def test_a_lookup_goes_on_in_the_store(engine, below):
    keys = engine.keys_of(TOKENS)
    assert engine.lookup(TOKENS) == 16
    put(below, keys[3:])
    assert engine.lookup(TOKENS) == 16
    put(below, keys[2:3])
    assert engine.lookup(TOKENS) == 32
    assert engine.lookup_keys(keys)[:2] == (2, 2)


def test_contains_tells_pool_from_store(engine, below):
    keys = engine.keys_of(TOKENS)
    put(below, keys[2:3])
    assert [engine.contains(key) for key in keys] == [0, 0, 1, -1]


def test_a_store_that_fails_costs_its_part_only(engine, below):
    put(below, engine.keys_of(TOKENS))
    below.fails = True
    assert engine.lookup(TOKENS) == 16
    assert engine.contains(engine.keys_of(TOKENS)[3]) == -1
    assert engine.get_stats()["failures"] == 2


def test_removing_takes_chunks_from_the_store_too(engine, below):
    keys = engine.keys_of(TOKENS)
    put(below, keys)
    assert engine.remove_keys(keys) == 2
    assert below.shards == {}
    assert engine.lookup(TOKENS) == 0


def test_the_store_is_closed_once(engine, below):
    engine.close()
    engine.close()
    assert below.closed == 1


def test_a_chunk_is_in_the_store_when_every_rank_is(below):
    keys = [bytes([index]) * 16 for index in range(3)]
    put(below, keys, rank=0)
    put(below, keys[:2], rank=1)
    assert leading_run(below, keys, ranks=2) == 2
    assert leading_run(below, keys, ranks=1) == 3
    assert leading_run(below, [], ranks=2) == 0


def test_the_null_store_holds_nothing():
    store = open_store(StoreConfig())
    assert isinstance(store, NullStore)
    shards, buffers = [Shard(bytes(16), 0)], [torch.zeros(8, dtype=torch.uint8)]
    assert list(store.put_from(shards, buffers)) == [Put.FAILED]
    assert list(store.contains(shards)) == [False]
    assert list(store.get_into(shards, buffers)) == [Got.ABSENT]
    assert store.remove(shards) == 0
    store.close()
    store.close()
