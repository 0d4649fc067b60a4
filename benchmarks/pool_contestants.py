"""Who takes part in ``benchmarks.pool``: each moves the same chunks between blocks and its cache, and says how long it took.

To be made in a process of its own (``benchmarks.contestants``). ``begin`` says what is moved; then ``store`` as often as wanted;
then ``begin_retrieves``, and ``retrieve`` as often as wanted. What was stored is removed again, untimed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.lmcache_peer import LMCacheEngine, PagedStorage, lmcache_engine
from benchmarks.measure import timed
from benchmarks.mooncake_peer import await_room, mooncake
from vcache.config import VCacheConfig
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec
from vcache.transfer.threads import default_threads

LAYERS: Final = 32
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256
BLOCKS_PER_CHUNK: Final = CHUNK_SIZE // BLOCK_SIZE
MIB: Final = 1 << 20


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

    def blocks(self, chunks: int, *, is_scattered: bool) -> npt.NDArray[np.int64]:
        """The blocks of a call of so many chunks."""
        ids: npt.NDArray[np.int64] = np.arange(self.spare * max(self.counts) * BLOCKS_PER_CHUNK)
        if is_scattered:
            ids = np.random.default_rng(0).permutation(ids)
        return ids[: chunks * BLOCKS_PER_CHUNK]

    def storage(self) -> torch.Tensor:
        """An engine's KV, random; a block holds K and V, as in vLLM's CPU backend."""
        blocks = self.spare * max(self.counts) * BLOCKS_PER_CHUNK
        storage = torch.zeros((LAYERS, blocks, BLOCK_SIZE, self.heads, 2 * self.head_size), dtype=torch.bfloat16)
        storage.view(torch.int16).random_()
        return storage


class _Contestant:
    """A context; what is entered into ``_ended`` ends with it."""

    def __init__(self, shape: Shape) -> None:
        torch.set_num_threads(default_threads())
        self._shape = shape
        self._ended = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()


class VCache(_Contestant):
    """VCache over a pool whose segment belongs to another process; and ``copy_`` between the same blocks and shared memory."""

    def __init__(self, shape: Shape, config: VCacheConfig) -> None:
        super().__init__(shape)
        self._storage = shape.storage()
        self._plain = self._storage.view(-1).view(torch.uint8)[: shape.most_bytes]
        self._shared = _shared_memory(shape.most_bytes)
        model = ModelSpec(
            model=f"benchmark of {shape.chunk_mib} MiB",
            dtype="bfloat16",
            num_layers=LAYERS,
            num_kv_heads=shape.heads,
            head_size=shape.head_size,
            block_size=BLOCK_SIZE,
            chunk_size=CHUNK_SIZE,
        )
        planes = list(self._storage.unbind(0))
        self._engine = self._ended.enter_context(VCacheEngine(config, model=model, kv_caches=planes))
        self._rounds = count()

    def begin(self, chunks: int, is_scattered: bool) -> None:
        self._ids = self._shape.blocks(chunks, is_scattered=is_scattered)
        slots = self._ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        self._slots = torch.from_numpy(slots.reshape(-1))
        self._tokens = torch.arange(chunks * CHUNK_SIZE)
        self._chunks = chunks
        self._nbytes = chunks * self._shape.chunk_bytes

    def store(self) -> float:
        salt = f"round {next(self._rounds)}"
        seconds = timed(lambda: self._engine.store(self._tokens, slot_mapping=self._slots, salt=salt))
        _expect("VCache's chunks", self._engine.clear(salt=salt), self._chunks)
        return seconds

    def begin_retrieves(self) -> None:
        self._engine.clear()
        self._engine.store(self._tokens, slot_mapping=self._slots)
        if self._shape.with_peers:  # otherwise there is no memory for another copy of it all
            _check_content(self._storage, self._ids, self.retrieve)

    def retrieve(self) -> float:
        return timed(lambda: _expect_all(self._engine.retrieve(self._tokens, slot_mapping=self._slots)))

    def copy_out(self) -> float:
        return timed(lambda: self._shared[: self._nbytes].copy_(self._plain[: self._nbytes]))

    def copy_in(self) -> float:
        return timed(lambda: self._plain[: self._nbytes].copy_(self._shared[: self._nbytes]))


class LMCache(_Contestant):
    """LMCache's engine over its LocalCPU backend."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._storage = shape.storage()
        self._engine: LMCacheEngine | None = None

    def begin(self, chunks: int, is_scattered: bool) -> None:
        self._ended.close()
        self._ids = self._shape.blocks(chunks, is_scattered=is_scattered)
        self._tokens = torch.arange(chunks * CHUNK_SIZE)
        self._engine = self._ended.enter_context(
            lmcache_engine(
                kv_shape=(LAYERS, 2, CHUNK_SIZE, self._shape.heads, self._shape.head_size),
                chunk_size=CHUNK_SIZE,
                nbytes=2 * chunks * self._shape.chunk_bytes + (64 << 20),
                storage=PagedStorage(self._storage, self._ids),
            )
        )

    def store(self) -> float:
        engine = self._begun()
        seconds = timed(lambda: engine.store(self._tokens))
        _expect("LMCache's tokens", engine.clear(), len(self._tokens))
        return seconds

    def begin_retrieves(self) -> None:
        self._begun().store(self._tokens)
        _check_content(self._storage, self._ids, self.retrieve)

    def retrieve(self) -> float:
        engine = self._begun()
        return timed(lambda: _expect_all(engine.retrieve(self._tokens)))

    def _begun(self) -> LMCacheEngine:
        assert self._engine is not None, "begin comes first"
        return self._engine


class Mooncake(_Contestant):
    """``batch_put_from`` and ``batch_get_into`` of contiguous memory; the store's own belongs to this process, or to another."""

    def __init__(self, shape: Shape, in_process: bool) -> None:
        super().__init__(shape)
        self._plain = torch.zeros(shape.most_bytes, dtype=torch.uint8).random_()
        nbytes = 2 * shape.most_bytes + (64 << 20)
        stage = self._ended.enter_context(Stage())
        self._client = self._ended.enter_context(mooncake(stage, nbytes=nbytes, in_process=in_process))
        self._client.register(self._plain)
        self._ended.callback(self._client.unregister, self._plain)
        await_room(self._client, ["first"], self._plain, shape.chunk_bytes)

    def begin(self, chunks: int, is_scattered: bool) -> None:
        self._names = [f"chunk {at}" for at in range(chunks)]

    def store(self) -> float:
        seconds = timed(lambda: self._client.put(self._names, self._plain, self._shape.chunk_bytes))
        self._client.clear()
        return seconds

    def begin_retrieves(self) -> None:
        self._client.put(self._names, self._plain, self._shape.chunk_bytes)

    def retrieve(self) -> float:
        return timed(lambda: self._client.get(self._names, self._plain, self._shape.chunk_bytes))


def _check_content(storage: torch.Tensor, block_ids: npt.NDArray[np.int64], retrieve: Callable[[], float]) -> None:
    blocks = storage.view(torch.int16)  # of numbers: a NaN is not equal to itself
    ids = torch.from_numpy(block_ids)
    before = blocks[:, ids]
    blocks[:, ids] = 0
    retrieve()
    if not torch.equal(blocks[:, ids], before):
        raise RuntimeError("what was given did not come back")


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"{what}: {found} instead of {expected}: the benchmark did not do what it says")


def _expect_all(loaded: torch.Tensor) -> None:
    if not bool(loaded.all()):
        raise RuntimeError("a chunk was lost")


def _shared_memory(nbytes: int) -> torch.Tensor:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).fill_(2)
