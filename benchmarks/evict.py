"""Allocation under pressure: how full a segment is when eviction begins, and what a write costs once every write needs one.

The real state machine (``benchmarks.state_machine``), one donor, payloads of one size or of four drawn at random, as models
that share a pool have. Not here: which entries go (``benchmarks.replay``).
"""

from __future__ import annotations

import random
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measure import Bar, Better, Effort, Result, spread
from benchmarks.state_machine import FOREVER_S, Member, StateMachine, without_garbage_collector
from vcache import protocol
from vcache.protocol import KEY_BYTES, Outcome
from vram_metadata_server.settings import ServiceSettings

MIB: Final = 1 << 20
SIZES: Final[dict[str, tuple[int, ...]]] = {
    "one payload size (2 MiB)": (2 * MIB,),
    "four payload sizes (0.5, 2, 5, 8 MiB)": (MIB // 2, 2 * MIB, 5 * MIB, 8 * MIB),
}
UTILISATION_BARS: Final = {1: Bar(0.95, Better.HIGHER), 4: Bar(0.90, Better.HIGHER)}
RESERVE_BAR: Final = Bar(20, Better.LOWER)
SEGMENT_BYTES: Final = 16 << 30
KEYS_PER_CALL: Final = (1, 16, 128)
ROUNDS: Final = 15
CALLS_PER_ROUND: Final = 64
#: An eviction policy may not run ahead here: what the allocator alone can fill.
NO_WATERMARKS: Final = {"high_watermark": 1.0, "low_watermark": 0.99}


def run(effort: Effort) -> list[Result]:
    """Utilisation (a fraction of the segment's data bytes), and microseconds of server time a reserved key."""
    results = []
    seeds = range(effort.rounds(ROUNDS))
    with without_garbage_collector():
        for case, sizes in SIZES.items():
            for what, settings in (("at the first eviction", {}), ("at the first refused write", NO_WATERMARKS)):
                filled = [Writer(sizes, seed, **settings).fill() for seed in seeds]
                bar = UTILISATION_BARS[len(sizes)] if not settings else None
                results.append(_result(f"evict: utilisation {what}", case, filled, "of the bytes", bar))
            for keys in KEYS_PER_CALL:
                writer = Writer(sizes, seed=0)
                writer.fill()
                pressed = [writer.press(keys) for _ in seeds]
                of_keys = f"{case}, {keys} a call"
                reserves = [round_.reserve_us for round_ in pressed]
                results.append(_result("evict: reserve", of_keys, reserves, "us/key", RESERVE_BAR))
                everything = [round_.all_us for round_ in pressed]
                results.append(_result("evict: reserve, commit, evict, retire", of_keys, everything, "us/key", None))
                refused = [round_.refused for round_ in pressed]
                results.append(_result("evict: writes refused", of_keys, refused, "of the writes", None))
    return results


def _result(benchmark: str, case: str, figures: Sequence[float], unit: str, bar: Bar | None) -> Result:
    return Result(benchmark, case, "VCache", statistics.median(figures), spread(figures), unit, bar=bar)


@dataclass(frozen=True)
class _Pressed:
    """One round of writes into a full pool, a key's share of it."""

    reserve_us: float
    all_us: float
    refused: float


class Writer:
    """A pool of one segment, and prompts of 16 chunks that nobody asks for again."""

    def __init__(self, sizes: Sequence[int], seed: int, **settings: float) -> None:
        self._sizes = sizes
        self._draw = random.Random(seed)
        self._machine = StateMachine(ServiceSettings(liveness_s=FOREVER_S, **settings))  # type: ignore[arg-type]
        self._member: Member = self._machine.join("writer")
        self._member.donate(data_bytes=SEGMENT_BYTES, records=SEGMENT_BYTES >> 16)

    def fill(self, keys: int = 16) -> float:
        """Writes until the first eviction or refusal; how full the segment was then."""
        while True:
            outcomes = self._write(keys)
            if Outcome.NO_SPACE in outcomes:
                return self._used()
            if self._machine.service.has_work:
                used = self._used()
                self._machine.tick()
                if self._machine.counter("evicted"):
                    return used

    def press(self, keys: int) -> _Pressed:
        """One round: as many writes as take turns with evictions, whatever they find."""
        machine = self._machine
        busy, reserving, refused, asked = machine.busy_s, 0.0, 0, 0
        for _ in range(CALLS_PER_ROUND):
            blob = secrets.token_bytes(KEY_BYTES * keys)
            before = machine.busy_s
            grants = self._member.say(protocol.Reserve, blob, b"", 0, 1, self._draw.choice(self._sizes), 256, 0, 0, 0.0)
            reserving += machine.busy_s - before
            self._member.say(protocol.Commit, [p[2] for p in protocol.PLACEMENT.iter_unpack(grants.placements)])
            machine.tick()
            machine.now += 0.001
            refused += grants.outcomes.count(Outcome.NO_SPACE)
            asked += keys
        return _Pressed(reserving / asked * 1e6, (machine.busy_s - busy) / asked * 1e6, refused / asked)

    def _write(self, keys: int) -> bytes:
        return self._member.write(secrets.token_bytes(KEY_BYTES * keys), nbytes=self._draw.choice(self._sizes))

    def _used(self) -> float:
        (segment,) = self._member.say(protocol.Stats).segments
        used: float = segment.used_bytes / segment.total_bytes
        return used
