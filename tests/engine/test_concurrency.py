"""Threads of one engine, and several engines, on overlapping prompts: every byte served is right."""

from __future__ import annotations

import random
import threading

from tests.engine.kv import BLOCK, CHUNK, fill, new_tensors, slots_of, wrong_blocks

PROMPTS = [[shared] * (2 * CHUNK) + [own] * (2 * CHUNK) for shared in (1, 2) for own in (3, 4, 5)]
BLOCKS = [list(range(8)), list(range(30, 38)), [9, 60, 11, 50, 13, 40, 15, 29]]


def run_together(*works):
    """Runs all at once; raises the first error of any."""
    problems = []

    def shielded(work):
        try:
            work()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=shielded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def mixed_work(engine, seed, rounds=60):
    def work():
        dice = random.Random(seed)
        for _ in range(rounds):
            tokens, blocks = dice.choice(PROMPTS), dice.choice(BLOCKS)
            tensors = new_tensors(64)
            match dice.randrange(4):
                case 0:
                    fill(tensors, tokens, blocks)
                    engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks))
                case 1:
                    assert engine.lookup(tokens) % CHUNK == 0
                case 2:
                    engine.remove_keys(engine.keys_of(tokens)[dice.randrange(4) :])
                case 3:
                    loaded = engine.retrieve(tokens, kvcaches=tensors, slot_mapping=slots_of(blocks)).tolist()
                    right = [index for index in range(8) if loaded[index * BLOCK]]
                    assert right == list(range(len(right)))
                    wrong = wrong_blocks(tensors, tokens, blocks, [True] * 32)
                    assert not set(wrong) & set(right)

    return work


def test_threads_share_one_engine(pool, open_engine):
    engine = open_engine(pool)
    run_together(*(mixed_work(engine, seed) for seed in range(4)))
    stats = engine.get_stats()
    assert stats["hits"] > 0
    assert stats["failures"] == 0


def test_engines_share_a_pool_too_small_for_their_prompts(config, server, start_donor, open_engine):
    start_donor(config, size="1MiB")
    engines = [open_engine(config) for _ in range(3)]
    run_together(*(mixed_work(engine, seed) for seed, engine in enumerate(engines)))
    assert sum(engine.get_stats()["hits"] for engine in engines) > 0


def test_one_prompt_stored_by_all_at_once_is_stored_once(pool, open_engine):
    engines = [open_engine(pool) for _ in range(3)]
    tokens = list(range(4 * CHUNK))

    def store(engine):
        tensors = new_tensors(64)
        fill(tensors, tokens, BLOCKS[0])
        return lambda: engine.store(tokens, kvcaches=tensors, slot_mapping=slots_of(BLOCKS[0]))

    run_together(*(store(engine) for engine in engines))
    stats = [engine.get_stats() for engine in engines]
    assert sum(stat["stored"] for stat in stats) == 4
    assert stats[-1]["server_entries"] == 4
