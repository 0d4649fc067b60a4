"""Store and retrieve between paged KV and the cache, judged against ``copy_`` of the same bytes and against the peers.

The whole way of a call is timed. VCache: hashing, the server's answer, the copy to or from a segment that another process
owns, validation or commit. LMCache: its engine with its LocalCPU backend, all in one process (``benchmarks.lmcache_peer``).
Mooncake: ``batch_put_from`` and ``batch_get_into`` of memory that is contiguous already, so without any gathering. ``copy_`` is torch's,
on faulted-in pages of private memory on one side and of shared memory on the other, in VCache's process. Each contestant runs in
a process of its own, with the same number of threads.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final

from benchmarks.contestants import Ask, contestant
from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave, judge, settled
from benchmarks.pool_contestants import BLOCK_SIZE, CHUNK_SIZE, LMCache, Mooncake, Shape, VCache
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage

ROUNDS: Final = 11
#: Of calls with a single chunk, which take milliseconds and vary more.
ROUNDS_OF_ONE: Final = 41
#: Between two calls: OpenMP's threads spin on for some milliseconds after a parallel region, on cores that others need.
SETTLE_S: Final = 0.01
COPY_BAR: Final = Bar(0.90, Better.HIGHER)
MOONCAKE_BAR: Final = Bar(4, Better.HIGHER)
JUDGED_MIB: Final = 32
COPY, VCACHE, LMCACHE, OVER_TCP, IN_PROCESS = "copy_", "VCache", "LMCache", "Mooncake over tcp", "Mooncake in-process"

SHAPES: Final = (
    Shape(32, heads=8, head_size=128, counts=(1, 16)),
    Shape(32, heads=8, head_size=128, counts=(64,), with_peers=False),
    Shape(8, heads=2, head_size=128, counts=(1, 64)),
    Shape(2, heads=1, head_size=64, counts=(1, 64)),
)
QUICK_SHAPES: Final = (Shape(2, heads=1, head_size=64, counts=(4,)),)


def run(effort: Effort) -> list[Result]:
    """GB/s of store and retrieve, case by case."""
    results: list[Result] = []
    for shape in SHAPES if effort is Effort.FULL else QUICK_SHAPES:
        if shape.with_peers or os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE > shape.needed_bytes:
            results += _of_shape(shape, effort)
    return results


def _of_shape(shape: Shape, effort: Effort) -> Iterator[Result]:
    with Stage() as stage, ExitStack() as ended:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
        start_pool(stage, config, [Donation("cpu:0", (1 + shape.spare) * shape.most_bytes + (64 << 20))])
        contestants = {VCACHE: ended.enter_context(contestant(VCache, shape, config))}
        if shape.with_peers:
            contestants[LMCACHE] = ended.enter_context(contestant(LMCache, shape))
            contestants[OVER_TCP] = ended.enter_context(contestant(Mooncake, shape, False))
            contestants[IN_PROCESS] = ended.enter_context(contestant(Mooncake, shape, True))
        for chunks in shape.counts:
            for is_scattered in (True, False):
                yield from _of_case(shape, contestants, chunks, is_scattered=is_scattered, effort=effort)


def _of_case(
    shape: Shape, contestants: Mapping[str, Ask], chunks: int, *, is_scattered: bool, effort: Effort
) -> Iterator[Result]:
    """Both ways of one case."""
    case = f"{chunks} x {shape.chunk_mib} MiB, {'scattered' if is_scattered else 'contiguous'} blocks"
    for ask in contestants.values():
        ask("begin", chunks, is_scattered)
    for way, copy in (("store", "copy_out"), ("retrieve", "copy_in")):
        if way == "retrieve":
            for ask in contestants.values():
                ask("begin_retrieves")
        acts: dict[str, Callable[[], float]] = {COPY: partial(contestants[VCACHE], copy)}
        acts |= {who: partial(ask, way) for who, ask in contestants.items()}
        nbytes = chunks * shape.chunk_bytes
        timed = {who: settled(act, nbytes, pause_s=SETTLE_S) for who, act in acts.items()}
        figures = interleave(timed, rounds=effort.rounds(ROUNDS if chunks > 1 else ROUNDS_OF_ONE))
        is_judged = shape.chunk_mib == JUDGED_MIB
        benchmark, bars = f"pool: {way}", {VCACHE: COPY_BAR} if is_judged else None
        yield from compare(benchmark, case, figures, unit="GB/s", against=COPY, bars=bars)
        if shape.with_peers:
            bar = MOONCAKE_BAR if is_judged else None
            yield judge(benchmark, case, figures, VCACHE, unit="GB/s", against=OVER_TCP, bar=bar)
