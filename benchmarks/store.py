"""The store below the pool: what it gives beside Mooncake used directly, and what it costs those who do not need it.

*From Mooncake*: 64 objects of 2 MiB whose owner is another process, over tcp. VCache's way is timed whole: hashing, the pool's
answer (nothing there), the store's, the transfer into staging memory by a process of its own, checksums, the copy into the
engine's planes. Mooncake's own is one ``batch_get_into`` of as many bytes into contiguous registered memory. Beside them the
same bytes from a segment of the pool.

*Write-through*: ``store`` into the pool, with and without Mooncake to be written behind it; the queue is empty each time.

*Breaker open*: half of a prompt is in the pool. Beyond it lies a store that cannot be reached, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any, Final

import numpy as np
import torch

from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave
from benchmarks.mooncake_peer import MooncakeClient
from vcache.config import VCacheConfig
from vcache.demo.mooncake import Mooncake
from vcache.demo.moved import await_store
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec

CHUNKS: Final = 64
CHUNK_BYTES: Final = 2 << 20
TOTAL_BYTES: Final = CHUNKS * CHUNK_BYTES
PLANES: Final = 32
BLOCK_SIZE: Final = 32
CHUNK_SIZE: Final = 256
ROUNDS: Final = 15
LOOKUP_ROUNDS: Final = 61
LOOKUPS: Final = 8  # timed as one: a call takes less than the clock and a thread's wake-up vary
#: Between two calls: other threads spin on for some milliseconds after a copy, on cores that others need.
SETTLE_S: Final = 0.01
#: Deadlines of a second would end transfers on a slow machine.
PATIENCE_S: Final = 30.0
RAW, BELOW, POOL = "batch_get_into", "VCache from Mooncake", "VCache from the pool"
THROUGH, NONE, OPEN = "write-through", "store: none", "breaker open"
_CASE = f"{CHUNKS} x {CHUNK_BYTES >> 20} MiB"

Figure = Callable[[], float]


def run(effort: Effort) -> list[Result]:
    """GB/s of loads, milliseconds of stores, microseconds of lookups. Raises ``RuntimeError`` when one did not do its work."""
    with Stage() as stage, ExitStack() as ended:
        (stage.directory / "pool").mkdir(mode=0o700)
        mooncake = Mooncake(stage, nbytes=4 * TOTAL_BYTES)
        config = _config(stage, kind="none")
        start_pool(stage, config, [Donation("cpu:0", 4 * TOTAL_BYTES)])
        mooncake.await_ready()
        bench = _Bench(
            plain=config,
            through=_config(stage, kind="mooncake", mooncake={"master": mooncake.address}),
            unreachable=_config(stage, kind="mooncake", mooncake={"master": "127.0.0.1:1"}),
            ended=ended,
        )
        raw = MooncakeClient(mooncake.address, 0)
        ended.callback(raw.close)
        return [*bench.loads(raw, effort), *bench.stores(effort), *bench.breaker(effort)]


def _config(stage: Stage, **store: Any) -> VCacheConfig:
    guard = {"timeout": PATIENCE_S, "write_timeout": PATIENCE_S}
    return VCacheConfig(
        runtime_dir=str(stage.directory / "pool"),
        chunk_size=CHUNK_SIZE,
        block_size=BLOCK_SIZE,
        client={"call_timeout": PATIENCE_S},
        store={"guard": guard, **store},
        promotion={"policy": "never"},
    )


class _Bench:
    """Engines of one process over the same planes and the same pool, with different stores below it."""

    def __init__(
        self, *, plain: VCacheConfig, through: VCacheConfig, unreachable: VCacheConfig, ended: ExitStack
    ) -> None:
        blocks = CHUNKS * CHUNK_SIZE // BLOCK_SIZE
        shape = (PLANES, 2 * blocks, BLOCK_SIZE, 1, CHUNK_BYTES // PLANES // CHUNK_SIZE // 2)
        self._storage = torch.zeros(shape, dtype=torch.bfloat16)
        self._storage.view(torch.int16).random_()
        self._block_ids = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
        slots = self._block_ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        self._slots = torch.from_numpy(slots.reshape(-1))
        self._tokens = torch.arange(CHUNKS * CHUNK_SIZE)
        self._salts = count()
        self._plain, self._through, self._open = (
            ended.enter_context(VCacheEngine(config, model=_model(), kv_caches=list(self._storage.unbind(0))))
            for config in (plain, through, unreachable)
        )
        await_store(self._through.get_stats)

    def loads(self, raw: MooncakeClient, effort: Effort) -> Iterator[Result]:
        """The same bytes from Mooncake, through VCache and not, and from the pool."""
        self._store(self._through, "below")
        _expect(self._through.flush(PATIENCE_S), "write-through")
        self._plain.clear()
        self._store(self._plain, "pool")
        _expect(self._through.get_stats()["store_written"] == CHUNKS, "write-through")
        plain = torch.ones(TOTAL_BYTES, dtype=torch.uint8)
        raw.register(plain)
        names = [f"raw {index}" for index in range(CHUNKS)]
        raw.put(names, plain, CHUNK_BYTES)
        self._check_content(lambda: self._retrieve(self._through, "below"))
        contestants = {
            RAW: lambda: raw.get(names, plain, CHUNK_BYTES),
            BELOW: lambda: self._retrieve(self._through, "below"),
            POOL: lambda: self._retrieve(self._plain, "pool"),
        }
        figures = interleave({name: _gb_per_s(act) for name, act in contestants.items()}, rounds=effort.rounds(ROUNDS))
        bars = {BELOW: Bar(0.8, Better.HIGHER), POOL: Bar(4, Better.HIGHER)}
        yield from compare("store: retrieve", _CASE, figures, unit="GB/s", against=RAW, bars=bars)
        raw.unregister(plain)
        self._plain.clear()

    def stores(self, effort: Effort) -> Iterator[Result]:
        """``store`` into the pool; what it wrote is removed again, untimed."""

        def stored(engine: VCacheEngine) -> float:
            salt = f"round {next(self._salts)}"
            time.sleep(SETTLE_S)
            seconds = _timed(lambda: engine.store(self._tokens, slot_mapping=self._slots, salt=salt))
            engine.flush(PATIENCE_S)
            removed = engine.remove_keys(engine.keys_of(self._tokens, salt=salt))
            _expect(removed == CHUNKS, "store")
            return seconds * 1e3

        contestants = {NONE: lambda: stored(self._plain), THROUGH: lambda: stored(self._through)}
        figures = interleave(contestants, rounds=effort.rounds(ROUNDS))
        bars = {THROUGH: Bar(1.15, Better.LOWER)}
        yield from compare("store: store", _CASE, figures, unit="ms", against=NONE, bars=bars)

    def breaker(self, effort: Effort) -> Iterator[Result]:
        """Lookups and loads of a prompt of which half is in the pool."""
        half = self._tokens.clone()
        half[len(half) // 2 :] += 1 << 20
        self._store(self._plain, "half")
        while self._open.get_stats()["store_circuit"] != "open":
            self._open.lookup(half, salt="half")
        engines = {NONE: self._plain, OPEN: self._open}
        bars = {OPEN: Bar(1.1, Better.LOWER)}
        present = len(half) // 2

        def looked_up(engine: VCacheEngine) -> float:
            keys = engine.keys_of(half, salt="half")

            def ask() -> None:
                for _ in range(LOOKUPS):
                    _expect(engine.lookup_keys(keys).hits == CHUNKS // 2, "lookup")

            return _timed(ask) / LOOKUPS * 1e6

        def retrieved(engine: VCacheEngine) -> float:
            time.sleep(SETTLE_S)
            loaded: list[torch.Tensor] = []
            seconds = _timed(lambda: loaded.append(engine.retrieve(half, slot_mapping=self._slots, salt="half")))
            _expect(int(loaded[0].sum()) == present, "retrieve")
            return seconds * 1e3

        for way, figure, unit, rounds in (
            ("lookup", looked_up, "us", LOOKUP_ROUNDS),
            ("retrieve", retrieved, "ms", ROUNDS),
        ):
            contestants: dict[str, Figure] = {name: partial(figure, engine) for name, engine in engines.items()}
            figures = interleave(contestants, rounds=effort.rounds(rounds))
            case = f"{way}, half of {_CASE} in the pool"
            yield from compare("store: breaker", case, figures, unit=unit, against=NONE, bars=bars)

    def _store(self, engine: VCacheEngine, salt: str) -> None:
        engine.store(self._tokens, slot_mapping=self._slots, salt=salt)
        _expect(engine.lookup(self._tokens, salt=salt) == len(self._tokens), "store")

    def _retrieve(self, engine: VCacheEngine, salt: str) -> None:
        _expect(bool(engine.retrieve(self._tokens, slot_mapping=self._slots, salt=salt).all()), "retrieve")

    def _check_content(self, retrieve: Callable[[], object]) -> None:
        blocks, ids = (
            self._storage.view(torch.int16),
            torch.from_numpy(self._block_ids),
        )  # of numbers: a NaN is not itself
        before = blocks[:, ids]
        blocks[:, ids] = 0
        retrieve()
        _expect(torch.equal(blocks[:, ids], before), "retrieve")


def _model() -> ModelSpec:
    return ModelSpec(
        model="benchmark",
        dtype="bfloat16",
        num_layers=PLANES,
        num_kv_heads=1,
        head_size=CHUNK_BYTES // PLANES // CHUNK_SIZE // 4,  # K and V of a token, in bfloat16
        block_size=BLOCK_SIZE,
        chunk_size=CHUNK_SIZE,
    )


def _gb_per_s(act: Callable[[], object]) -> Figure:
    """The act's bytes a second, taken when other threads have come to rest."""

    def figure() -> float:
        time.sleep(SETTLE_S)
        return TOTAL_BYTES / _timed(act) / 1e9

    return figure


def _timed(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def _expect(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"{what}: not all chunks: the benchmark did not do what it says")
