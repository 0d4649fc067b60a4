"""A pool without room: stores are skipped and counted, pinned chunks stay, the rest makes way."""

from __future__ import annotations

import pytest

from tests.engine.conftest import eventually
from tests.engine.kv import CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks

HERE, THERE = list(range(8)), list(range(20, 28))
#: Four chunks each, together more than a segment of 1 MiB has records for (64).
PROMPTS = [[own] * (4 * CHUNK) for own in range(1, 41)]


def store(engine, tokens, **named):
    tensors = new_tensors(64)
    fill(tensors, tokens, HERE, salt=named.get("salt", ""))
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(HERE), **named)


def loaded(engine, tokens):
    tensors = new_tensors(64)
    result = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(THERE)).tolist()
    assert wrong_blocks(tensors, tokens, THERE, result) == []
    return sum(result)


@pytest.fixture
def full(config, server, start_donor, open_engine):
    """An engine on a pool of about 60 chunks."""
    start_donor(config, size="1MiB")
    return open_engine(config)


def test_a_store_without_room_is_skipped_and_counted(full):
    for tokens in PROMPTS:
        store(full, tokens, pin=60)
    stats = full.get_stats()
    assert stats["store_no_space"] > 0
    assert stats["stored"] + stats["store_no_space"] + stats["store_declined"] == 4 * len(PROMPTS)
    assert stats["failures"] == 0
    assert [loaded(full, tokens) for tokens in PROMPTS[:10]] == [32] * 10


def test_pinned_chunks_stay_while_others_make_way(full):
    store(full, PROMPTS[0], pin=60)
    store(full, PROMPTS[1])
    full.lookup(PROMPTS[1], pin=60)
    for tokens in PROMPTS[2:]:
        store(full, tokens)
    eventually(lambda: full.get_stats()["evictions"] > 0, "the server evicts")
    assert [loaded(full, tokens) for tokens in PROMPTS[:2]] == [32, 32]
    assert sum(loaded(full, tokens) > 0 for tokens in PROMPTS[2:]) < len(PROMPTS[2:])


def test_a_pin_that_is_ended_holds_nothing(full):
    keys = full.keys_of(PROMPTS[0])
    store(full, PROMPTS[0], pin=60)
    assert full.get_stats()["server_pins"] == 4
    assert full.unpin_keys(keys) == 4
    assert full.pin_keys(keys[:2], 60) == 2
    assert full.get_stats()["server_pins"] == 2


def test_a_retrieve_may_pin_what_it_loads(full):
    store(full, PROMPTS[0])
    tensors = new_tensors(64)
    full.retrieve(PROMPTS[0], kvcaches=tensors, slot_mapping=slots_of(THERE), pin=True)
    assert full.get_stats()["server_pins"] == 4


def test_a_pool_without_a_segment_takes_nothing(config, server, open_engine):
    engine = open_engine(config)
    store(engine, PROMPTS[0])
    stats = engine.get_stats()
    assert (stats["stored"], stats["store_declined"] + stats["store_no_space"]) == (0, 4)
    assert engine.lookup(PROMPTS[0]) == 0


def test_a_chunk_larger_than_any_segment_is_declined(config, server, start_donor, open_engine):
    start_donor(config, size="1MiB")
    wide = {f"layer.{i}": tensor for i, tensor in enumerate(new_tensors(8, layers=2400).values())}
    engine = open_engine(config, model=model_of(layers=2400))
    engine.store([1] * CHUNK, kvcaches=wide, slot_mapping=slots_of([0, 1]))
    assert engine.get_stats()["store_declined"] == 1
