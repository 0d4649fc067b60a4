"""Donors that die while others read their memory, and memory in use over many cycles: on the host, and on a GPU where there is one."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from tests.engine.conftest import NUM_BLOCKS, eventually, serving_segments
from tests.engine.kv import BLOCK, CHUNK, fill, new_tensors, slots_of, wrong_blocks

HERE, THERE = list(range(8)), [20, 19, 40, 41, 5, 63, 0, 30]
PROMPTS = [[own] * (4 * CHUNK) for own in range(4)]
QUICK = {"server": {"heartbeat_interval": "100ms", "liveness_timeout": "1s"}}
#: Reads asked for before the donor dies.
READS = 40
#: What a cycle may leave behind by accident: an allocator's block, not a payload each.
SLACK_BYTES = 8 << 20


def is_right(answer) -> bool:
    """Whether all that a worker loaded is what was stored. What it did not load may have been overwritten."""
    return not [index for index in answer["wrong"] if index < answer["loaded"] // BLOCK]


def test_readers_outlive_a_donor_that_is_killed_under_them(start_server, start_donor, start_worker, device):
    config, _ = start_server(**QUICK)
    doomed = start_donor(config, device=device)
    writer, reader = (start_worker(config, device=device) for _ in range(2))
    for count, tokens in enumerate(PROMPTS, 1):
        assert writer.do("store", tokens=tokens, blocks=HERE) == {"stored": 4 * count}
    asked = [PROMPTS[index % len(PROMPTS)] for index in range(READS)]
    answers = reader.do_all([{"do": "retrieve", "tokens": tokens, "blocks": THERE} for tokens in asked])
    assert next(answers) == {"loaded": 32, "wrong": []}
    doomed.kill()
    assert all(map(is_right, answers))
    eventually(lambda: serving_segments(config) == 0, "the dead donor's segment is dropped")
    for worker in (writer, reader):
        assert worker.do("lookup", tokens=PROMPTS[0])["hits"] == 0
        assert worker.do("retrieve", tokens=PROMPTS[0], blocks=THERE)["loaded"] == 0
    start_donor(config, device=device)
    assert writer.do("store", tokens=PROMPTS[1], blocks=HERE)["stored"] == 4 * len(PROMPTS) + 4
    assert reader.do("retrieve", tokens=PROMPTS[1], blocks=THERE) == {"loaded": 32, "wrong": []}


def test_what_is_removed_and_overwritten_between_the_copy_and_its_end_is_not_loaded(
    start_server, start_donor, open_engine, device
):
    config, _ = start_server(**QUICK)
    start_donor(config, device=device, size="1MiB")
    tensors = new_tensors(NUM_BLOCKS, device=device)
    fill(tensors, PROMPTS[0], HERE)
    reader, other = (open_engine(config, device=device, kv_caches=tensors) for _ in range(2))
    other.store(PROMPTS[0], slot_mapping=slots_of(HERE))
    assert other.flush()
    keys = reader.keys_of(PROMPTS[0])
    reading = reader.begin_retrieve(keys, torch.tensor(THERE).view(4, 2).numpy())
    assert other.remove_keys(keys) == 4
    for own in range(100, 140):  # more than the segment has room for
        other.store([own] * (4 * CHUNK), slot_mapping=slots_of(HERE))
    assert reading.complete() == 0
    stats = reader.get_stats()
    assert (stats["hits"], stats["misses"], stats["validation_failures"], stats["failures"]) == (0, 4, 4, 0)


def test_what_was_idle_is_unmapped_and_loaded_from_again(start_server, start_donor, open_engine, device, caplog):
    caplog.set_level(logging.INFO, logger="vcache.pool.mappings")
    config, _ = start_server(**QUICK, transfer={"unmap_after": "300ms"})
    start_donor(config, device=device)
    tensors = new_tensors(NUM_BLOCKS, device=device)
    fill(tensors, PROMPTS[1], HERE)
    engine = open_engine(config, device=device, kv_caches=tensors)
    engine.store(PROMPTS[1], slot_mapping=slots_of(HERE))
    assert engine.flush()
    for uses in (1, 2):
        eventually(lambda uses=uses: caplog.text.count("unmapping segment") == uses, "it was idle")
        loaded = new_tensors(NUM_BLOCKS, device=device)
        mask = engine.retrieve(PROMPTS[1], kvcaches=loaded, slot_mapping=slots_of(THERE)).tolist()
        assert all(mask) and wrong_blocks(loaded, PROMPTS[1], THERE, mask) == []
    assert engine.get_stats()["failures"] == 0


def test_memory_in_use_stays_as_it_is_over_many_cycles(start_server, start_donor, open_engine, device):
    """Every store needs an eviction, and what is loaded is what was stored. On a GPU ten thousand times."""
    cycles = 10_000 if device.startswith("cuda") else 300
    config, _ = start_server()
    start_donor(config, device=device, size="1MiB")
    tensors, loaded = (new_tensors(NUM_BLOCKS, device=device) for _ in range(2))
    engine = open_engine(config, device=device, kv_caches=tensors)
    used = []
    for cycle in range(cycles):
        tokens = [cycle] * (4 * CHUNK)
        if not cycle % 50:
            fill(tensors, tokens, HERE)
        engine.store(tokens, slot_mapping=slots_of(HERE))
        mask = engine.retrieve(tokens, kvcaches=loaded, slot_mapping=slots_of(THERE))
        if not cycle % 50:
            wrong = wrong_blocks(loaded, tokens, THERE, [True] * len(tokens))
            assert is_right({"loaded": int(mask.sum()), "wrong": wrong}), (cycle, wrong)
            used.append(in_use(device))
    stats = engine.get_stats()
    # How many stores find room is a matter of how fast the donor is: none waits for it.
    assert stats["evictions"] > cycles and stats["hits"] > cycles and stats["failures"] == 0
    assert max(used[1:]) - used[1] < SLACK_BYTES, used


def in_use(device: str) -> int:
    """Bytes of the GPU that are in use, by all processes; on the host, what this one has mapped."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmSize"].split()[0]) << 10
