"""Where the time of an engine's store and retrieve goes: the stages of a call, one after the other, in wall time.

Between launch and end the device is waited for, so that the copy is a stage of its own; in a call it is waited for once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measure import Result, compare
from vcache.engine import VCacheEngine
from vcache.pool.client import PoolClient

KEYS, SERVER, LAUNCH, COPY, END, TELLING = "keys", "the server", "launch", "the copy", "records", "telling the server"
WHOLE: Final = "all stages"


def stages(
    engine: VCacheEngine,
    device: torch.device,
    chunks: int,
    whence: npt.NDArray[np.int64],
    whither: npt.NDArray[np.int64],
    *,
    rounds: int,
) -> Iterator[Result]:
    """Microseconds of each stage, and its share of all; ``whence`` and ``whither`` are the blocks, ``[chunks * per chunk]``."""
    tokens = torch.arange(chunks * engine.model.chunk_size)
    whence, whither = whence.reshape(chunks, -1), whither.reshape(chunks, -1)
    salts = (f"stages {number}" for number in count())

    def stored() -> Mapping[str, float]:
        salt = next(salts)
        with _time_in(PoolClient, "reserve", "commit") as spent:
            clock = _Clock(device)
            keys = engine.keys_of(tokens, salt=salt)
            clock.lap(KEYS)
            pending = engine.begin_store(keys, whence, salt=salt)
            clock.lap(LAUNCH)
            clock.lap(COPY, waits=True)
            is_stored = pending.complete() == chunks
            clock.lap(END)
        if not is_stored or engine.clear(salt=salt) != chunks:
            raise RuntimeError("gpu: not every chunk was stored")
        return clock.parted(server=(LAUNCH, spent["reserve"]), telling=(END, spent["commit"]))

    def loaded() -> Mapping[str, float]:
        with _time_in(PoolClient, "acquire", "release") as spent:
            clock = _Clock(device)
            keys = engine.keys_of(tokens)
            clock.lap(KEYS)
            pending = engine.begin_retrieve(keys, whither)
            clock.lap(LAUNCH)
            clock.lap(COPY, waits=True)
            is_loaded = pending.complete() == chunks
            clock.lap(END)
        if not is_loaded:
            raise RuntimeError("gpu: not every chunk was loaded")
        return clock.parted(server=(LAUNCH, spent["acquire"]), telling=(END, spent["release"]))

    engine.store(tokens, slot_mapping=_slots(whence, engine.model.block_size))
    engine.flush()
    for what, act in {"store": stored, "retrieve": loaded}.items():
        act()
        figures = _columns([act() for _ in range(rounds)])
        case = f"{len(tokens):,} tokens"
        yield from compare(f"gpu: where the time of a {what} goes", case, figures, unit="us", against=WHOLE)
    engine.clear()


class _Clock:
    """Laps of a call in microseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        self._settle()
        self._last = time.perf_counter()

    def lap(self, name: str, *, waits: bool = False) -> None:
        """Ends a lap, once the device is done if it ``waits``."""
        if waits:
            self._settle()
        now = time.perf_counter()
        self._laps[name] = (now - self._last) * 1e6
        self._last = now

    def parted(self, *, server: tuple[str, float], telling: tuple[str, float]) -> dict[str, float]:
        """The laps, with the microseconds that were spent on the server within two of them as stages of their own."""
        laps = dict(self._laps)
        for lap, spent in (server, telling):
            laps[lap] -= spent
        whole = sum(self._laps.values())
        return {
            KEYS: laps[KEYS], SERVER: server[1], LAUNCH: laps[LAUNCH], COPY: laps[COPY], END: laps[END],
            TELLING: telling[1], WHOLE: whole,
        }  # fmt: skip

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def _time_in(owner: type, *methods: str) -> Iterator[dict[str, float]]:
    """Microseconds that are spent in methods of a class, while in the block."""
    spent = dict.fromkeys(methods, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                spent[name] += (time.perf_counter() - begin) * 1e6

        return call

    originals = {name: getattr(owner, name) for name in methods}
    for name, method in originals.items():
        setattr(owner, name, timed(name, method))
    try:
        yield spent
    finally:
        for name, method in originals.items():
            setattr(owner, name, method)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _slots(blocks: npt.NDArray[np.int64], block_size: int) -> torch.Tensor:
    return torch.from_numpy((blocks.ravel()[:, None] * block_size + np.arange(block_size)).ravel())
