"""Store and retrieve between paged KV and the cache, judged against ``copy_`` of the same bytes and against the peers.

The whole way of a call is timed. VCache: hashing, the server's answer, the copy to or from a segment that another process
owns, validation or commit. LMCache: its engine with its LocalCPU backend, all in this process (``benchmarks.lmcache_peer``).
Mooncake: ``batch_put_from`` and ``batch_get_into`` of memory that is contiguous already, so without any gathering. ``copy_`` is torch's,
on faulted-in pages of private memory on one side and of shared memory on the other; all have the same number of threads.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.lmcache_peer import LMCacheEngine, PagedStorage, lmcache_engine
from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave, judge, settled, timed
from benchmarks.mooncake_peer import MooncakeClient, await_room, mooncake
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec
from vcache.transfer.threads import default_threads

LAYERS: Final = 32
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256
BLOCKS_PER_CHUNK: Final = CHUNK_SIZE // BLOCK_SIZE
MIB: Final = 1 << 20
ROUNDS: Final = 11
#: Between two calls: OpenMP's threads spin on for some milliseconds after a parallel region, on cores that others need.
SETTLE_S: Final = 0.01
COPY_BAR: Final = Bar(0.90, Better.HIGHER)
MOONCAKE_BAR: Final = Bar(4, Better.HIGHER)
COPY, VCACHE, LMCACHE, OVER_TCP, IN_PROCESS = "copy_", "VCache", "LMCache", "Mooncake over tcp", "Mooncake in-process"


@dataclass(frozen=True)
class Shape:
    """Chunks of one size: a model's heads per layer, and how many chunks a call moves."""

    chunk_mib: int
    heads: int
    head_size: int
    counts: tuple[int, ...]
    #: Beside LMCache and Mooncake, each with memory of its own for as much.
    with_peers: bool = True

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_mib * MIB

    @property
    def most_bytes(self) -> int:
        return max(self.counts) * self.chunk_bytes

    @property
    def spare(self) -> int:
        """How many times the blocks, and the space in the pool, that a call needs are there."""
        return 2 if self.with_peers else 1

    @property
    def needed_bytes(self) -> int:
        """Blocks, as much in shared memory, a segment; and some to spare."""
        return (2 * self.spare + 3) * self.most_bytes


SHAPES: Final = (
    Shape(32, heads=8, head_size=128, counts=(1, 16)),
    Shape(32, heads=8, head_size=128, counts=(64,), with_peers=False),
    Shape(8, heads=2, head_size=128, counts=(1, 64)),
    Shape(2, heads=1, head_size=64, counts=(1, 64)),
)
QUICK_SHAPES: Final = (Shape(2, heads=1, head_size=64, counts=(4,)),)

Figure = Callable[[], float]


def run(effort: Effort) -> list[Result]:
    """GB/s of store and retrieve, case by case."""
    before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    shapes = SHAPES if effort is Effort.FULL else QUICK_SHAPES
    results: list[Result] = []
    try:
        for shape in shapes:
            if shape.with_peers or os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE > shape.needed_bytes:
                results += _of_shape(shape, effort)
        return results
    finally:
        torch.set_num_threads(before)


def _of_shape(shape: Shape, effort: Effort) -> Iterator[Result]:
    with Stage() as stage:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
        start_pool(stage, config, [Donation("cpu:0", (1 + shape.spare) * shape.most_bytes + (64 << 20))])
        with _Contest(stage, config, shape) as contest:
            for chunks in shape.counts:
                for is_scattered in (True, False):
                    yield from contest.measure(chunks, is_scattered=is_scattered, effort=effort)


class _Contest:
    """All contestants, ready for chunks of one shape."""

    def __init__(self, stage: Stage, config: VCacheConfig, shape: Shape) -> None:
        self._stage, self._config, self._shape = stage, config, shape
        self._blocks = max(shape.counts) * BLOCKS_PER_CHUNK
        self._ended = ExitStack()
        # One storage for all contestants; a block holds K and V, as in vLLM's CPU backend.
        self.storage = torch.zeros(
            (LAYERS, shape.spare * self._blocks, BLOCK_SIZE, shape.heads, 2 * shape.head_size), dtype=torch.bfloat16
        )
        self.storage.view(torch.int16).random_()
        self._plain = self.storage.view(-1).view(torch.uint8)[: shape.most_bytes]
        self._shared = _shared_memory(shape.most_bytes)

    def __enter__(self) -> Self:
        shape, enter = self._shape, self._ended.enter_context
        model = ModelSpec(
            model=f"benchmark of {shape.chunk_mib} MiB",
            dtype="bfloat16",
            num_layers=LAYERS,
            num_kv_heads=shape.heads,
            head_size=shape.head_size,
            block_size=BLOCK_SIZE,
            chunk_size=CHUNK_SIZE,
        )
        planes = list(self.storage.unbind(0))
        try:
            self._vcache = enter(VCacheEngine(self._config, model=model, kv_caches=planes))
            nbytes = 2 * shape.most_bytes + (64 << 20)
            self._stores = {
                who: enter(self._mooncake(nbytes, in_process=who == IN_PROCESS))
                for who in (OVER_TCP, IN_PROCESS)
                if shape.with_peers
            }
        except BaseException:
            self._ended.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    @contextmanager
    def _mooncake(self, nbytes: int, *, in_process: bool) -> Iterator[MooncakeClient]:
        with mooncake(self._stage, nbytes=nbytes, in_process=in_process) as client:
            client.register(self._plain)
            await_room(client, ["first"], self._plain, self._shape.chunk_bytes)
            yield client
            client.unregister(self._plain)

    def measure(self, chunks: int, *, is_scattered: bool, effort: Effort) -> Iterator[Result]:
        """Both ways of one case."""
        shape = self._shape
        blocks = "scattered" if is_scattered else "contiguous"
        case = f"{chunks} x {shape.chunk_mib} MiB, {blocks} blocks"
        block_ids: npt.NDArray[np.int64] = np.arange(shape.spare * self._blocks)
        if is_scattered:
            block_ids = np.random.default_rng(0).permutation(block_ids)
        block_ids = block_ids[: chunks * BLOCKS_PER_CHUNK]
        kv_shape = (LAYERS, 2, CHUNK_SIZE, shape.heads, shape.head_size)
        storage = PagedStorage(self.storage, block_ids)
        nbytes = chunks * shape.chunk_bytes
        with ExitStack() as ended:
            room = 2 * nbytes + (64 << 20)
            lmcache = (
                ended.enter_context(
                    lmcache_engine(kv_shape=kv_shape, chunk_size=CHUNK_SIZE, nbytes=room, storage=storage)
                )
                if shape.with_peers
                else None
            )
            case_of = _Case(self, lmcache, block_ids, chunks, nbytes)
            for way, prepare in (("store", case_of.stores), ("retrieve", case_of.retrieves)):
                rounds = effort.rounds(ROUNDS)
                figures = interleave(
                    {who: settled(act, nbytes, pause_s=SETTLE_S) for who, act in prepare().items()}, rounds=rounds
                )
                benchmark = f"pool: {way}"
                is_judged = shape.chunk_mib == 32
                bars = {VCACHE: COPY_BAR} if is_judged else None
                yield from compare(benchmark, case, figures, unit="GB/s", against=COPY, bars=bars)
                bar = MOONCAKE_BAR if is_judged else None
                if not shape.with_peers:
                    continue
                yield judge(benchmark, case, figures, VCACHE, unit="GB/s", against=OVER_TCP, bar=bar)


class _Case:
    """The acts of one case; each answers the seconds it took."""

    def __init__(
        self,
        contest: _Contest,
        lmcache: LMCacheEngine | None,
        block_ids: npt.NDArray[np.int64],
        chunks: int,
        nbytes: int,
    ) -> None:
        self._contest, self._lmcache, self._nbytes = contest, lmcache, nbytes
        self._block_ids, self._chunks = block_ids, chunks
        slots = block_ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        self._slots = torch.from_numpy(slots.reshape(-1))
        self._tokens = torch.arange(chunks * CHUNK_SIZE)
        self._names = [f"chunk {at}" for at in range(chunks)]
        self._rounds = count()
        self._piece = nbytes // chunks

    def stores(self) -> dict[str, Figure]:
        """From the engine's blocks into the cache; what was stored is removed again, untimed."""
        contest, piece, names = self._contest, self._piece, self._names
        vcache = contest._vcache
        plain, shared = contest._plain[: self._nbytes], contest._shared[: self._nbytes]

        def to_vcache() -> float:
            salt = f"round {next(self._rounds)}"
            seconds = timed(lambda: vcache.store(self._tokens, slot_mapping=self._slots, salt=salt))
            _expect("VCache's chunks", vcache.clear(salt=salt), self._chunks)
            return seconds

        def to_lmcache(lmcache: LMCacheEngine) -> float:
            seconds = timed(lambda: lmcache.store(self._tokens))
            _expect("LMCache's tokens", lmcache.clear(), self._chunks * CHUNK_SIZE)
            return seconds

        def put(client: MooncakeClient) -> float:
            seconds = timed(lambda: client.put(names, plain, piece))
            client.clear()
            return seconds

        acts: dict[str, Figure] = {COPY: lambda: timed(lambda: shared.copy_(plain)), VCACHE: to_vcache}
        if self._lmcache is not None:
            acts[LMCACHE] = partial(to_lmcache, self._lmcache)
        return acts | {who: partial(put, client) for who, client in contest._stores.items()}

    def retrieves(self) -> dict[str, Figure]:
        """The other way. Checks first that VCache and LMCache bring back what they were given."""
        contest, piece, names = self._contest, self._piece, self._names
        vcache = contest._vcache
        plain, shared = contest._plain[: self._nbytes], contest._shared[: self._nbytes]
        for client in contest._stores.values():
            client.put(names, plain, piece)
        vcache.clear()
        vcache.store(self._tokens, slot_mapping=self._slots)

        def from_vcache() -> float:
            return timed(lambda: _expect_all("VCache", vcache.retrieve(self._tokens, slot_mapping=self._slots)))

        def from_lmcache(lmcache: LMCacheEngine) -> float:
            return timed(lambda: _expect_all("LMCache", lmcache.retrieve(self._tokens)))

        def get(client: MooncakeClient) -> float:
            return timed(lambda: client.get(names, plain, piece))

        acts: dict[str, Figure] = {VCACHE: from_vcache}
        if self._lmcache is not None:
            self._lmcache.store(self._tokens)
            acts[LMCACHE] = partial(from_lmcache, self._lmcache)
        if contest._shape.with_peers:  # otherwise there is no memory for another copy of it all
            for who, act in acts.items():
                self._check_content(who, act)
        copies: dict[str, Figure] = {COPY: lambda: timed(lambda: plain.copy_(shared))}
        return copies | acts | {who: partial(get, client) for who, client in contest._stores.items()}

    def _check_content(self, who: str, retrieve: Figure) -> None:
        blocks = self._contest.storage.view(torch.int16)  # of numbers: a NaN is not equal to itself
        ids = torch.from_numpy(self._block_ids)
        before = blocks[:, ids]
        blocks[:, ids] = 0
        retrieve()
        if not torch.equal(blocks[:, ids], before):
            raise RuntimeError(f"{who} did not bring back what it was given")


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"{what}: {found} instead of {expected}: the benchmark did not do what it says")


def _expect_all(who: str, loaded: torch.Tensor) -> None:
    if not bool(loaded.all()):
        raise RuntimeError(f"{who} lost a chunk")


def _shared_memory(nbytes: int) -> torch.Tensor:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).fill_(2)
