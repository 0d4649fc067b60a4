"""Store and load between planes and payloads in host memory, judged against ``Tensor.copy_`` of the same bytes.

Both sides use the same number of threads on faulted-in pages: planes in ordinary memory, as an engine's, payloads in shared
memory, as a segment's. Not here: the way through the pool (``benchmarks.pool``), GPUs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave
from vcache.paged_kv import PagedKV
from vcache.transfer import gather, scatter
from vcache.transfer.threads import default_threads

CHUNKS = 16
PLANES = 32
BLOCKS_PER_CHUNK = 8
#: Between two copies: OpenMP's threads spin on for some milliseconds after a parallel region, on cores that others need.
SETTLE_S = 0.01
BAR = Bar(0.85, Better.HIGHER)


@dataclass(frozen=True)
class Case:
    """One shape of the copies; its chunks have 32 planes of 8 blocks."""

    name: str
    block_bytes: int
    scattered: bool = True
    one_storage: bool = True
    judged: bool = False


CASES = (
    Case("32 MiB chunks", 128 << 10, judged=True),
    Case("32 MiB chunks, neighbouring blocks", 128 << 10, scattered=False),
    Case("32 MiB chunks, a storage per layer", 128 << 10, one_storage=False),
    Case("8 MiB chunks", 32 << 10),
    Case("2 MiB chunks", 8 << 10),
    Case("1 MiB chunks (blocks of 4 KiB)", 4 << 10),
)


def run(effort: Effort) -> list[Result]:
    """GB/s of store, load and ``copy_``, each case both ways."""
    results: list[Result] = []
    for case in CASES:
        with _prepared(case) as (store, load, nbytes):
            full = min(101, max(15, (8 << 30) // nbytes))
            for way, contestants in (("store", store), ("load", load)):
                figures = interleave(
                    {name: _timed(copy, nbytes) for name, copy in contestants.items()},
                    rounds=effort.rounds(full),
                )
                bars = {way: BAR} if case.judged else None
                results += compare(f"copies: {way}", case.name, figures, unit="GB/s", against="copy_", bars=bars)
    return results


Contestants = dict[str, Callable[[], object]]


@contextmanager
def _prepared(case: Case) -> Iterator[tuple[Contestants, Contestants, int]]:
    """The contestants of both ways and the bytes each moves; torch uses our number of threads meanwhile."""
    num_blocks = 2 * CHUNKS * BLOCKS_PER_CHUNK
    shape = (PLANES, num_blocks, case.block_bytes)
    caches = torch.ones(shape, dtype=torch.uint8)
    tensors = list(caches.unbind(0)) if case.one_storage else [plane.clone() for plane in caches.unbind(0)]
    kv = PagedKV(tensors, block_size=32)
    payload_bytes = kv.payload_bytes(BLOCKS_PER_CHUNK)
    nbytes = CHUNKS * payload_bytes
    block_ids: npt.NDArray[np.int64] = np.arange(num_blocks)
    if case.scattered:
        block_ids = np.random.default_rng(0).permutation(num_blocks)
    block_ids = block_ids[: CHUNKS * BLOCKS_PER_CHUNK].reshape(CHUNKS, BLOCKS_PER_CHUNK)
    offsets = np.arange(CHUNKS) * payload_bytes
    segment = _shared_memory(nbytes)
    plain = caches.view(-1)[:nbytes]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    try:
        yield (
            {"copy_": lambda: segment.copy_(plain), "store": lambda: gather(kv, block_ids, segment, offsets)},
            {"copy_": lambda: plain.copy_(segment), "load": lambda: scatter(kv, block_ids, segment, offsets)},
            nbytes,
        )
    finally:
        torch.set_num_threads(threads_before)


def _shared_memory(nbytes: int) -> torch.Tensor:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        segment = torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    return segment.fill_(2)


def _timed(copy: Callable[[], object], nbytes: int) -> Callable[[], float]:
    def figure() -> float:
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        copy()
        return nbytes / (time.perf_counter() - start) / 1e9

    return figure
