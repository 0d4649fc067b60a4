"""Planes and segments on one device, and on devices of different kinds: what was stored comes back, byte by byte."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import NUM_BLOCKS
from tests.engine.kv import fill, new_tensors, slots_of, wrong_blocks

TOKENS = list(range(32))
HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
CUDA = pytest.mark.cuda


@pytest.mark.parametrize(
    ("planes", "segment"),
    [
        pytest.param("cpu", "cpu:0"),
        pytest.param("cuda", "cpu:0", marks=CUDA),
        pytest.param("cpu", "cuda:0", marks=CUDA),
        pytest.param("cuda", "cuda:0", marks=CUDA),
    ],
)
def test_stored_from_planes_into_a_segment_and_back(start_server, start_donor, open_engine, planes, segment):
    config, _ = start_server(promotion={"policy": "never"})
    start_donor(config, device=segment)
    tensors, loaded = new_tensors(NUM_BLOCKS, device=planes), new_tensors(NUM_BLOCKS, device=planes)
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, kv_caches=tensors)
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    mask = engine.retrieve(TOKENS, kvcaches=loaded, slot_mapping=slots_of(THERE))
    assert mask.tolist() == [True] * 32
    assert wrong_blocks(loaded, TOKENS, THERE, mask.tolist()) == []
    stats = engine.get_stats()
    assert (stats["stored"], stats["hits"], stats["failures"]) == (4, 4, 0)


@pytest.mark.parametrize("planes", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_host_memory_of_its_own_process_is_stored_into_and_loaded_from(start_server, open_engine, planes):
    config, _ = start_server(segment={"tier": "dram"})
    tensors, loaded = new_tensors(NUM_BLOCKS, device=planes), new_tensors(NUM_BLOCKS, device=planes)
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, kv_caches=tensors, donate="2MiB")
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    mask = engine.retrieve(TOKENS, kvcaches=loaded, slot_mapping=slots_of(THERE))
    assert mask.tolist() == [True] * 32
    assert wrong_blocks(loaded, TOKENS, THERE, mask.tolist()) == []
    stats = engine.get_stats()
    assert (stats["stored"], stats["failures"], stats["client_unpinned_grants"]) == (4, 0, 0)
    assert stats["dram_written_bytes"] > 0


@CUDA
@pytest.mark.parametrize("segment", ["cpu:0", "cuda:0"])
def test_a_store_leaves_the_device_at_what_it_computes(start_server, start_donor, open_engine, segment):
    # Its other calls wait for the store as long as for the server: longer than the device is kept busy.
    config, _ = start_server(promotion={"policy": "never"}, client={"call_timeout": "20s"})
    start_donor(config, device=segment)
    tensors, loaded = new_tensors(NUM_BLOCKS, device="cuda"), new_tensors(NUM_BLOCKS, device="cuda")
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, kv_caches=tensors)
    engine.store(TOKENS[:8], slot_mapping=slots_of(HERE[:2]))  # it maps the segment, and compiles
    assert engine.flush()
    is_over = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    is_over.record()
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert not is_over.query()
    for tensor in tensors.values():
        tensor.zero_()  # behind the store, on the same stream
    mask = engine.retrieve(TOKENS, kvcaches=loaded, slot_mapping=slots_of(THERE))
    assert is_over.query()
    assert mask.tolist() == [True] * 32
    assert wrong_blocks(loaded, TOKENS, THERE, mask.tolist()) == []
    stats = engine.get_stats()
    assert (stats["stored"], stats["failures"], stats["client_unpinned_grants"]) == (4, 0, 0)


@CUDA
def test_what_an_engine_has_given_is_retired_while_its_device_computes(start_server, open_engine):
    config, _ = start_server(client={"call_timeout": "20s"})
    tensors = new_tensors(NUM_BLOCKS, device="cuda")
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, kv_caches=tensors, donate="4MiB")
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert engine.flush()
    is_over = torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.default_stream()):  # which streams of other kinds wait for
        torch.cuda._sleep(2_000_000_000)  # about a second
        is_over.record()
    assert engine.remove_keys(engine.keys_of(TOKENS)) == 4  # the server answers once they are gone from memory
    assert not is_over.query()


@CUDA
def test_a_gpu_without_memory_for_the_way_is_a_miss_and_a_store_less(
    start_server, start_donor, open_engine, monkeypatch
):
    config, _ = start_server(promotion={"policy": "never"})
    start_donor(config, device="cpu:0")
    tensors = new_tensors(NUM_BLOCKS, device="cuda")
    fill(tensors, TOKENS, HERE)
    engine = open_engine(config, kv_caches=tensors)
    engine.store(TOKENS[:16], slot_mapping=slots_of(HERE[:4]))

    def none_left(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", none_left)
    assert not engine.retrieve(TOKENS, slot_mapping=slots_of(THERE)).any()
    engine.store(TOKENS, slot_mapping=slots_of(HERE))
    assert engine.flush()
    stats = engine.get_stats()
    assert (stats["failures"], stats["stored"], stats["store_lost"]) == (2, 2, 2)
    assert stats["server_reservations"] == 0
    monkeypatch.undo()
    assert engine.retrieve(TOKENS, slot_mapping=slots_of(THERE)).tolist() == [True] * 16 + [False] * 16
