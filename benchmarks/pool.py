"""Store and retrieve through the pool, the segment in another process, judged against ``copy_`` of the same bytes.

The whole way of a call of ``VCacheEngine`` is timed: hashing, the server's answer, the copy, validation or commit. ``copy_`` is
torch's, with as many threads as the engine uses, on faulted-in pages of private memory on one side and of shared memory on the
other, as the engine's planes and the segment are.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import torch

from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec
from vcache.transfer.threads import default_threads

CHUNKS = 16
PLANES = 32
BLOCK_SIZE = 32
CHUNK_SIZE = 256
BYTES_PER_TOKEN_AND_PLANE = 4096
CHUNK_BYTES = CHUNK_SIZE * PLANES * BYTES_PER_TOKEN_AND_PLANE
TOTAL_BYTES = CHUNKS * CHUNK_BYTES
ROUNDS = 15
BARS = {"store": Bar(0.85, Better.HIGHER), "retrieve": Bar(0.85, Better.HIGHER)}
_CASE = "16 chunks of 32 MiB, scattered blocks of 128 KiB"


def run(effort: Effort) -> list[Result]:
    """GB/s of store and retrieve, each beside ``copy_`` in its direction."""
    before = torch.get_num_threads()
    with Stage() as stage:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
        start_pool(stage, config, [Donation("cpu:0", 3 * TOTAL_BYTES)])
        torch.set_num_threads(default_threads())
        try:
            return _measure(config, effort)
        finally:
            torch.set_num_threads(before)


def _measure(config: VCacheConfig, effort: Effort) -> list[Result]:
    blocks = CHUNKS * CHUNK_SIZE // BLOCK_SIZE
    shape = (PLANES, 2 * blocks, BLOCK_SIZE * BYTES_PER_TOKEN_AND_PLANE // 2)
    storage = torch.zeros(shape, dtype=torch.bfloat16)
    storage.view(torch.int16).random_()
    planes = list(storage.view(PLANES, 2 * blocks, BLOCK_SIZE, 8, 256).unbind(0))
    block_ids = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
    slots = torch.from_numpy((block_ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1))
    tokens = torch.arange(CHUNKS * CHUNK_SIZE)
    model = ModelSpec(
        model="benchmark",
        dtype="bfloat16",
        num_layers=PLANES,
        num_kv_heads=8,
        head_size=128,
        block_size=BLOCK_SIZE,
        chunk_size=CHUNK_SIZE,
    )
    private = storage.view(-1).view(torch.uint8)[:TOTAL_BYTES]
    shared = _shared_memory(TOTAL_BYTES)
    rounds = effort.rounds(ROUNDS)
    with VCacheEngine(config, model=model, kv_caches=planes) as engine:
        salts = count()

        def store() -> float:
            salt = f"round {next(salts)}"
            start = time.perf_counter()
            engine.store(tokens, slot_mapping=slots, salt=salt)
            seconds = time.perf_counter() - start
            if engine.clear(salt=salt) != CHUNKS:
                raise RuntimeError("the benchmark's pool did not take every chunk")
            return TOTAL_BYTES / seconds / 1e9

        stored = interleave({"copy_": _copying(shared, private), "store": store}, rounds=rounds)
        engine.store(tokens, slot_mapping=slots)

        def retrieve() -> float:
            start = time.perf_counter()
            loaded = engine.retrieve(tokens, slot_mapping=slots)
            seconds = time.perf_counter() - start
            if not bool(loaded.all()):
                raise RuntimeError("the benchmark's pool lost a chunk")
            return TOTAL_BYTES / seconds / 1e9

        before = storage.clone()
        storage.view(torch.int16)[:, torch.from_numpy(block_ids)] = 0
        retrieve()
        if not torch.equal(before.view(torch.int16), storage.view(torch.int16)):
            raise RuntimeError("retrieve did not bring back what store was given")
        del before
        retrieved = interleave({"copy_": _copying(private, shared), "retrieve": retrieve}, rounds=rounds)
    return [
        *compare("pool: store", _CASE, stored, unit="GB/s", against="copy_", bars=BARS),
        *compare("pool: retrieve", _CASE, retrieved, unit="GB/s", against="copy_", bars=BARS),
    ]


def _copying(target: torch.Tensor, source: torch.Tensor) -> Callable[[], float]:
    def figure() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return TOTAL_BYTES / (time.perf_counter() - start) / 1e9

    return figure


def _shared_memory(nbytes: int) -> torch.Tensor:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).fill_(2)
