"""LMCache in process over VCache, beside LMCache over its own LocalCPU backend: store, retrieve, and the lookup of 32k tokens.

Three engines of LMCache in this process, with one connector (``benchmarks.lmcache_peer``) and the same blocks: LocalCPU, which keeps
chunks in memory of its own; VCache as its allocator, which computes chunks into a segment that this process donates and reads them
there; and VCache as a plugin, which copies to and from a segment of another process. What VCache holds, every LMCache of the host finds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.lmcache_peer import LMCacheEngine, PagedStorage, lmcache_engine
from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave, settled, timed
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.transfer.threads import default_threads

LAYERS: Final = 32
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256
MIB: Final = 1 << 20
ROUNDS: Final = 15
LOOKUP_ROUNDS: Final = 61
LOOKUP_CHUNKS: Final = 128
CALLS: Final = 8  # timed as one
SETTLE_S: Final = 0.02  # between two calls: other threads come to rest, a put is done
LOCAL_CPU, ALLOCATOR, PLUGIN = "LocalCPU", "VCache, allocator", "VCache, plugin"
COPY_BAR: Final = Bar(0.9, Better.HIGHER)
LOOKUP_BAR: Final = Bar(1.0, Better.LOWER)
#: A busy machine is not to be taken for a server that is away.
PATIENT: Final = {"call_timeout": "20s", "connect_timeout": "30s"}

Figure = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """A prompt's chunks. ``is_judged``: whether the bars are for it."""

    chunks: int
    chunk_mib: int
    heads: int
    head_size: int
    is_judged: bool = True

    @property
    def nbytes(self) -> int:
        return self.chunks * self.chunk_mib * MIB

    @property
    def case(self) -> str:
        return f"{self.chunks} x {self.chunk_mib} MiB"


SHAPES: Final = (Shape(16, 32, 8, 128), Shape(16, 8, 2, 128), Shape(16, 2, 1, 64, is_judged=False))
QUICK_SHAPES: Final = (Shape(4, 2, 1, 64, is_judged=False),)


def run(effort: Effort) -> list[Result]:
    """GB/s of store and retrieve, microseconds of lookups."""
    before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    os.environ.setdefault("PYTHONHASHSEED", "0")  # what VCache warns of otherwise does not matter in one process
    try:
        results: list[Result] = []
        for shape in SHAPES if effort is Effort.FULL else QUICK_SHAPES:
            results += _moved(shape, effort)
        return [*results, *_looked_up(effort)]
    finally:
        torch.set_num_threads(before)


# --- store and retrieve -------------------------------------------------------------------------------------------------


def _moved(shape: Shape, effort: Effort) -> Iterator[Result]:
    blocks = shape.chunks * CHUNK_SIZE // BLOCK_SIZE
    tensor = torch.zeros((LAYERS, 2 * blocks, BLOCK_SIZE, shape.heads, 2 * shape.head_size), dtype=torch.bfloat16)
    tensor.view(torch.int16).random_()
    block_ids = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
    storage = PagedStorage(tensor, block_ids)
    kv_shape = (LAYERS, 2, CHUNK_SIZE, shape.heads, shape.head_size)
    with _engines(kv_shape, shape.nbytes, storage) as engines:
        rounds = effort.rounds(ROUNDS)
        bars = {ALLOCATOR: COPY_BAR} if shape.is_judged else None
        prompts = itertools.count()

        def stores(engine: LMCacheEngine) -> float:
            tokens = torch.arange(shape.chunks * CHUNK_SIZE) + next(prompts) * shape.chunks * CHUNK_SIZE
            seconds = timed(lambda: engine.store(tokens))
            _expect(engine.lookup(tokens), len(tokens))  # it waits for what is done in the background
            _expect(engine.clear(), len(tokens))
            return seconds

        acts = {
            who: settled(partial(stores, engine), shape.nbytes, pause_s=SETTLE_S) for who, engine in engines.items()
        }
        figures = interleave(acts, rounds=rounds)
        yield from compare("lmcache: store", shape.case, figures, unit="GB/s", against=LOCAL_CPU, bars=bars)

        tokens = torch.arange(shape.chunks * CHUNK_SIZE)

        def retrieves(engine: LMCacheEngine) -> float:
            return timed(lambda: _expect(int(engine.retrieve(tokens).sum()), len(tokens)))

        for engine in engines.values():
            engine.store(tokens)
            _expect(engine.lookup(tokens), len(tokens))
            _check_content(storage, block_ids, lambda engine=engine: retrieves(engine))  # type: ignore[misc]
        acts = {
            who: settled(partial(retrieves, engine), shape.nbytes, pause_s=SETTLE_S) for who, engine in engines.items()
        }
        figures = interleave(acts, rounds=rounds)
        yield from compare("lmcache: retrieve", shape.case, figures, unit="GB/s", against=LOCAL_CPU, bars=bars)


def _check_content(
    storage: PagedStorage, block_ids: np.typing.NDArray[np.int64], retrieve: Callable[[], object]
) -> None:
    blocks, ids = storage.tensor.view(torch.int16), torch.from_numpy(block_ids)  # numbers: a NaN is not equal to itself
    before = blocks[:, ids]
    blocks[:, ids] = 0
    retrieve()
    if not torch.equal(blocks[:, ids], before):
        raise RuntimeError("an engine did not bring back what it was given")


# --- lookups ------------------------------------------------------------------------------------------------------------


def _looked_up(effort: Effort) -> Iterator[Result]:
    length = LOOKUP_CHUNKS * CHUNK_SIZE
    blocks = length // BLOCK_SIZE
    storage = PagedStorage(torch.zeros((1, blocks, BLOCK_SIZE, 128), dtype=torch.bfloat16), np.arange(blocks))
    with _engines((1, 2, CHUNK_SIZE, 1, 64), LOOKUP_CHUNKS * CHUNK_SIZE * 256, storage) as engines:
        prompt = torch.arange(length)
        for engine in engines.values():
            engine.store(prompt)
            _expect(engine.lookup(prompt), length)
        for name, tokens, expected in (("all hit", prompt, length), ("miss", prompt + length, 0)):
            for form, ask in _forms(engines[LOCAL_CPU], tokens).items():
                for engine in engines.values():
                    _expect(ask(engine), expected)
                figures = interleave(
                    {who: _asked(ask, engine) for who, engine in engines.items()}, rounds=effort.rounds(LOOKUP_ROUNDS)
                )
                bars = {ALLOCATOR: LOOKUP_BAR, PLUGIN: LOOKUP_BAR} if expected else None
                yield from compare(
                    "lmcache: lookup", f"{form}, {name}", figures, unit="us", against=LOCAL_CPU, bars=bars
                )


def _forms(engine: LMCacheEngine, tokens: torch.Tensor) -> dict[str, Callable[[LMCacheEngine], int]]:
    as_list = tokens.tolist()
    hashes = [key.chunk_hash for _, _, key in engine.token_database.process_tokens(tokens=tokens)]
    lengths = [CHUNK_SIZE] * LOOKUP_CHUNKS

    def pinned(asked: LMCacheEngine) -> int:
        found = asked.lookup(tokens, lookup_id="benchmark", pin=True)
        asked.lookup_unpin("benchmark")
        return found

    return {
        "list of ints": lambda asked: asked.lookup(as_list),
        "tensor": lambda asked: asked.lookup(tokens),
        "hashes": lambda asked: asked.lookup(hashes=hashes, offsets=lengths),
        "tensor, pinned": pinned,
    }


def _asked(ask: Callable[[LMCacheEngine], int], engine: LMCacheEngine) -> Figure:
    def figure() -> float:
        return timed(lambda: [ask(engine) for _ in range(CALLS)]) / CALLS * 1e6

    return figure


# --- the engines --------------------------------------------------------------------------------------------------------


@contextmanager
def _engines(kv_shape: tuple[int, ...], nbytes: int, storage: PagedStorage) -> Iterator[dict[str, LMCacheEngine]]:
    """By name, with room for two prompts of ``nbytes`` each."""
    room = 2 * nbytes + 64 * MIB
    with Stage() as stage, ExitStack() as ended:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        # The plugin's, in a process of its own; it has more room than the other, and so takes what the plugin stores.
        start_pool(stage, VCacheConfig(runtime_dir=str(runtime_dir)), [Donation("cpu:0", 2 * room)])
        settings: dict[str, dict[str, Any]] = {
            LOCAL_CPU: {},
            ALLOCATOR: _allocator(runtime_dir, room),
            PLUGIN: _plugin(runtime_dir),
        }
        yield {
            who: ended.enter_context(
                lmcache_engine(kv_shape=kv_shape, chunk_size=CHUNK_SIZE, nbytes=room, storage=storage, settings=own)
            )
            for who, own in settings.items()
        }


def _plugin(runtime_dir: Path) -> dict[str, Any]:
    extra = {
        "storage_plugin.vcache.module_path": "vcache_lmcache",
        "storage_plugin.vcache.class_name": "VCacheBackend",
        "vcache": {"runtime_dir": str(runtime_dir), "namespace": "plugin", "log_level": "WARNING", "client": PATIENT},
    }
    return {"local_cpu": False, "storage_plugins": ["vcache"], "extra_config": extra}


def _allocator(runtime_dir: Path, nbytes: int) -> dict[str, Any]:
    extra = {
        "storage_plugin.LocalCPUBackend.module_path": "vcache_lmcache",
        "storage_plugin.LocalCPUBackend.class_name": "VCacheAllocatorBackend",
        "vcache": {
            "runtime_dir": str(runtime_dir),
            "namespace": "allocator",
            "donate": nbytes,
            "log_level": "WARNING",
            "client": PATIENT,
        },
    }
    return {
        "local_cpu": False,
        "max_local_cpu_size": 0,
        "storage_plugins": ["LocalCPUBackend"],
        "extra_config": extra,
    }


def _expect(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"{found} tokens instead of {expected}: the benchmark did not do what it says")
