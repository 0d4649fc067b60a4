"""What is stored is found and loaded, byte for byte; what was not asked for is left alone. On the host, and on a GPU where there is one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.engine.kv import BLOCK, CHUNK, fill, model_of, new_tensors, slots_of, wrong_blocks
from vcache.keys import format_key

TOKENS = list(range(100, 100 + 4 * CHUNK))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]


@pytest.fixture(autouse=True)
def _tensors_on_the_device(device, monkeypatch):
    monkeypatch.setattr(f"{__name__}.new_tensors", partial(new_tensors, device=device))


@pytest.fixture
def engine(pool, open_engine):
    return open_engine(pool)


def store(engine, tokens=TOKENS, blocks=HERE, **named):
    tensors = new_tensors(64)
    fill(tensors, tokens, blocks, salt=named.get("salt", ""))
    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks), **named)


def retrieve(engine, tokens=TOKENS, blocks=THERE, *, expect, **named):
    """Loads into untouched tensors; every block is what the result says, and the result what is expected."""
    tensors = new_tensors(64)
    slots = slots_of(blocks)[: len(tokens)]
    loaded = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots, **named)
    assert loaded.dtype == torch.bool
    assert loaded.device.type == "cpu"
    assert loaded.tolist() == expect
    everywhere = expect + [False] * (-len(expect) % BLOCK)
    assert (
        wrong_blocks(tensors, tokens, blocks[: len(everywhere) // BLOCK], everywhere, salt=named.get("salt", "")) == []
    )
    others = sorted(set(range(64)) - set(blocks))
    assert wrong_blocks(tensors, tokens, others, [False] * len(others) * BLOCK) == []


def loaded(tokens, count, start=0):
    return [start <= i < start + count for i in range(tokens)]


def test_what_is_stored_is_found_and_loaded_elsewhere(engine):
    assert engine.lookup(TOKENS) == 0
    retrieve(engine, expect=loaded(32, 0))
    store(engine)
    assert engine.lookup(TOKENS) == 32
    retrieve(engine, expect=loaded(32, 32))


def test_only_whole_chunks_are_stored(engine):
    tokens = TOKENS[: 2 * CHUNK + BLOCK]
    store(engine, tokens, HERE[:5])
    assert engine.lookup(tokens) == 2 * CHUNK
    retrieve(engine, tokens, THERE[:5], expect=loaded(20, 16))


def test_less_than_a_chunk_is_nothing(engine):
    store(engine, TOKENS[:BLOCK], HERE[:1])
    assert engine.lookup(TOKENS[:BLOCK]) == 0
    retrieve(engine, TOKENS[:BLOCK], THERE[:1], expect=[False] * BLOCK)


def test_a_shared_prefix_is_a_hit_up_to_where_prompts_differ(engine):
    store(engine)
    other = TOKENS[: 2 * CHUNK] + [7] * (2 * CHUNK)
    assert engine.lookup(other) == 2 * CHUNK
    retrieve(engine, other, expect=loaded(32, 16))


def test_equal_chunks_after_different_tokens_are_no_hit(engine):
    store(engine)
    assert engine.lookup([1] * CHUNK + TOKENS[CHUNK:]) == 0


def test_a_mask_leaves_out_what_the_caller_has(engine):
    store(engine)
    mask = torch.arange(32) >= 16
    retrieve(engine, mask=mask, expect=loaded(32, 16, start=16))


def test_a_mask_leaves_out_what_is_stored_already(engine):
    store(engine, TOKENS[:16], HERE[:4])
    store(engine, mask=torch.arange(32) >= 16)
    assert engine.get_stats()["store_exists"] == 0
    retrieve(engine, expect=loaded(32, 32))


def test_chunks_without_their_prefix_are_no_hit_until_it_comes(engine):
    store(engine, mask=torch.arange(32) >= 16)
    assert engine.lookup(TOKENS) == 0
    store(engine, TOKENS[:16], HERE[:4])
    retrieve(engine, expect=loaded(32, 32))


@pytest.mark.parametrize("offset", [0, 4, 16])
def test_slots_count_from_the_offset(engine, offset):
    store(engine, TOKENS[:16], HERE[:4])
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    slots = slots_of(HERE)[offset:]
    engine.store(TOKENS, torch.arange(32) >= 16, tensors, slots, offset)
    retrieve(engine, expect=loaded(32, 32))


def test_without_a_mask_all_from_the_offset_on_is_stored(engine):
    store(engine, TOKENS[:16], HERE[:4])
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    engine.store(TOKENS, None, tensors, slots_of(HERE)[16:], 16)
    assert engine.get_stats()["stored"] == 4
    retrieve(engine, expect=loaded(32, 32))


def test_a_mask_without_a_true_does_nothing(engine):
    store(engine, mask=torch.zeros(32, dtype=torch.bool))
    assert engine.lookup(TOKENS) == 0
    retrieve(engine, mask=torch.zeros(32, dtype=torch.bool), expect=loaded(32, 0))


def test_storing_again_stores_nothing_new(engine):
    store(engine)
    store(engine)
    stats = engine.get_stats()
    assert (stats["stored"], stats["store_exists"]) == (4, 4)


def test_tokens_slots_and_masks_may_be_lists_arrays_or_tensors(engine):
    tensors = new_tensors(64)
    fill(tensors, TOKENS, HERE)
    engine.store(np.array(TOKENS, np.int32), np.ones(32, bool), tensors, slots_of(HERE).numpy())
    for tokens, slots in [(torch.tensor(TOKENS), slots_of(THERE).to(torch.int32)), (tuple(TOKENS), slots_of(THERE))]:
        fresh = new_tensors(64)
        assert engine.retrieve(tokens, [True] * 32, fresh, slots).all()
        assert wrong_blocks(fresh, TOKENS, THERE, [True] * 32) == []


def test_registered_tensors_are_used_where_none_are_given(pool, open_engine):
    stored, wanted = new_tensors(64), new_tensors(64)
    fill(stored, TOKENS, HERE)
    first, second = open_engine(pool, kv_caches=stored), open_engine(pool)
    first.store(TOKENS, slot_mapping=slots_of(HERE))
    first.get_stats()  # a round trip: the commit before it has arrived
    second.register_kv_caches(wanted)
    assert second.retrieve(TOKENS, slot_mapping=slots_of(THERE)).all()
    assert wrong_blocks(wanted, TOKENS, THERE, [True] * 32) == []


def test_another_form_of_the_same_tensors_is_the_same_kv(engine):
    store(engine)
    wanted = new_tensors(64)
    assert engine.retrieve(TOKENS, None, list(wanted.values()), slots_of(THERE)).all()
    assert wrong_blocks(wanted, TOKENS, THERE, [True] * 32) == []


def test_salts_share_nothing(engine):
    store(engine, salt="one")
    for other in ("", "two"):
        assert engine.lookup(TOKENS, salt=other) == 0
        retrieve(engine, salt=other, expect=loaded(32, 0))
    retrieve(engine, salt="one", expect=loaded(32, 32))


def test_extra_keys_share_nothing(engine):
    store(engine, extra_keys=("lora-1",))
    assert engine.lookup(TOKENS) == 0
    assert engine.lookup(TOKENS, extra_keys=("lora-2",)) == 0
    retrieve(engine, extra_keys=("lora-1",), expect=loaded(32, 32))


def test_another_model_shares_nothing(pool, open_engine, engine):
    store(engine)
    assert open_engine(pool, model=model_of(name="other")).lookup(TOKENS) == 0


def test_contains_takes_a_key_and_its_text(engine):
    keys = engine.keys_of(TOKENS)
    assert engine.contains(keys[0]) == -1
    store(engine)
    assert [engine.contains(key) for key in keys] == [0] * 4
    assert engine.contains(format_key(keys[3])) == 0
    assert engine.contains(engine.keys_of(TOKENS, salt="other")[0]) == -1


def test_removed_means_gone_and_clear_takes_one_tenant(engine):
    store(engine)
    store(engine, salt="one")
    keys = engine.keys_of(TOKENS)
    assert engine.remove_keys(keys[2:]) == 2
    assert engine.lookup(TOKENS) == 16
    assert engine.clear(salt="") == 2
    assert (engine.lookup(TOKENS), engine.lookup(TOKENS, salt="one")) == (0, 32)
    assert engine.clear() == 4
    assert engine.lookup(TOKENS, salt="one") == 0


def test_chunks_are_moved_by_key_and_block(pool, open_engine):
    stored, wanted = new_tensors(64), new_tensors(64)
    fill(stored, TOKENS, HERE)
    first, second = open_engine(pool, kv_caches=stored), open_engine(pool, kv_caches=wanted)
    keys = first.keys_of(TOKENS)
    writing = first.begin_store(keys[:2], np.reshape(HERE[:4], (2, 2)))
    assert writing.complete() == 2
    assert writing.complete() == 2
    assert first.begin_store(keys[2:], HERE[4:], parent=keys[1]).complete() == 2
    first.get_stats()  # a round trip: the commits before it have arrived
    found = second.lookup_keys(keys, lease_s=5)
    assert (found.pool, found.store, found.hits) == (4, 0, 4)
    assert found.lease
    reading = second.begin_retrieve(keys[1:], torch.tensor(THERE[2:]).view(3, 2))
    assert reading.complete() == 3
    assert reading.complete() == 3
    second.release(found.lease)
    assert wrong_blocks(wanted, TOKENS, THERE, [False] * 8 + [True] * 24) == []


OTHER_FORMS = {
    "keys before values": lambda kv: torch.zeros(2, 64, *kv.shape[2:]).to(kv),
    "heads before tokens": lambda kv: torch.zeros(64, 2, kv.shape[3], kv.shape[2], kv.shape[4]).to(kv),
    "transposed in memory": lambda kv: torch.zeros_like(kv).transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_tensors_of_another_form_are_a_miss_although_the_models_are_described_alike(engine, form, device):
    store(engine)
    others = {name: OTHER_FORMS[form](tensor) for name, tensor in new_tensors(64).items()}
    result = engine.retrieve(TOKENS, kvcaches=others, slot_mapping=slots_of(THERE))
    assert not result.any()
    if device == "cpu:0":  # on a GPU the form is seen behind the copy
        assert not any(tensor.any() for tensor in others.values())
    assert engine.get_stats()["client_misfit_hits"] == 4
    retrieve(engine, expect=loaded(32, 32))
