"""How the server's cost grows with donors, entries and keys a call: the real state machine, a simulated clock, no sockets.

Each point is a pool made anew in a process of its own: so many hosts of 8 donors, so many entries in prompts of 128 chunks
spread over them. Measured is the server's own time per operation (``benchmarks.state_machine``), each a few hundred times on
prompts drawn at random, and the process's growth in memory. ``docs/scale.md`` says what follows.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final

from benchmarks.measure import Effort, Result, spread
from benchmarks.server_memory import resident_bytes
from benchmarks.state_machine import Member, StateMachine, without_garbage_collector
from vcache import protocol
from vcache.protocol import KEY_BYTES

DONORS_PER_HOST: Final = 8
PROMPT: Final = 128  # chunks: 32,768 tokens
STEP: Final = 32  # chunks that one prefill step stores: 8,192 tokens
SAMPLES: Final = 300
QUICK_SAMPLES: Final = 20
PAYLOAD_BYTES: Final = 4096

BY_DONORS, BY_ENTRIES, BY_KEYS = "by donors", "by entries", "by keys a call"


@dataclass(frozen=True)
class Point:
    """One pool, and the run that is asked for."""

    series: str
    donors: int
    entries: int
    keys: int = PROMPT

    @property
    def size(self) -> int:
        return {BY_DONORS: self.donors, BY_ENTRIES: self.entries, BY_KEYS: self.keys}[self.series]


POINTS: Final = (
    *(Point(BY_DONORS, donors, 200_000) for donors in (8, 80, 1000, 4000)),
    *(Point(BY_ENTRIES, 80, entries) for entries in (1_024, 32_768, 1_000_000, 2_000_000)),
    *(Point(BY_KEYS, 80, 100_000, keys) for keys in (1, 16, 128, 512)),
)
QUICK_POINTS: Final = (
    *(Point(BY_DONORS, donors, 2_000) for donors in (8, 80)),
    *(Point(BY_ENTRIES, 8, entries) for entries in (1_024, 8_192)),
    *(Point(BY_KEYS, 8, 2_048, keys) for keys in (1, 128)),
)


@dataclass(frozen=True)
class Measured:
    """Microseconds of each operation's samples, and bytes of memory an entry."""

    operations: dict[str, list[float]]
    bytes_per_entry: float


def run(effort: Effort) -> list[Result]:
    """Microseconds of the server's time per operation, and bytes per entry."""
    points = POINTS if effort is Effort.FULL else QUICK_POINTS
    samples = SAMPLES if effort is Effort.FULL else QUICK_SAMPLES
    context = multiprocessing.get_context("spawn")
    # One at a time: what is measured are memory accesses, and neighbours share the cache.
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as process:
        measured = dict(zip(points, process.map(measure, points, [samples] * len(points)), strict=True))
    return list(_results(measured))


def _results(measured: dict[Point, Measured]) -> Iterator[Result]:
    smallest = {series: next(p for p in measured if p.series == series) for series in (BY_DONORS, BY_ENTRIES, BY_KEYS)}
    for point, figures in measured.items():
        panel = point.series
        case = f"{point.donors:,} donors, {point.entries:,} entries, {point.keys} keys a call"
        place = {"panel": panel, "size": point.size, "size_unit": panel.removeprefix("by ")}
        base = measured[smallest[panel]]
        for operation, samples in figures.operations.items():
            median = statistics.median(samples)
            first = statistics.median(base.operations[operation])
            yield Result(
                "scale: server time",
                case,
                operation,
                median,
                spread(samples),
                "us",
                ratio=None if point == smallest[panel] else median / first,
                against=None if point == smallest[panel] else f"{smallest[panel].size:,} {panel.removeprefix('by ')}",
                **place,  # type: ignore[arg-type]
            )
        if panel == BY_ENTRIES:
            yield Result(
                "scale: memory",
                case,
                "state machine",
                figures.bytes_per_entry,
                0.0,
                "bytes/entry",
                **place,  # type: ignore[arg-type]
            )


def measure(point: Point, samples: int) -> Measured:
    """Builds the pool of a point and times each operation on it."""
    with without_garbage_collector():
        before = resident_bytes()
        pool = _Pool(point)
        grown = resident_bytes() - before
        operations: dict[str, Callable[[], object]] = {
            "acquire": pool.acquire,
            "lookup": pool.lookup,
            "reserve and commit": pool.store,
            "heartbeat": pool.heartbeat,
            "tick with nothing to do": pool.machine.tick,
            "a process joins": pool.join,
        }
        pool.tell_all_of_all()
        times = {name: pool.timed(act, samples) for name, act in operations.items()}
        times["acquire after a segment joined"] = pool.timed(pool.acquire, samples, before_each=pool.donate)
        times["a donor leaves"] = pool.timed(pool.leave, min(samples, point.donors // 2))
        return Measured(times, grown / point.entries)


class _Pool:
    """Donors on hosts, prompts in their segments."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._draw = random.Random(0)
        self._next_key = 1
        self._joined = 0
        self.machine = StateMachine()
        per_donor = -(-point.entries // point.donors)
        records = 2 * per_donor + 4 * PROMPT  # half full: nothing is evicted here
        self._members: list[Member] = []
        for at in range(point.donors):
            member = self.machine.join(f"donor-{at}", host=at // DONORS_PER_HOST)
            member.donate(data_bytes=records * PAYLOAD_BYTES, records=records)
            self._members.append(member)
        self._prompts: list[bytes] = []
        self._fill()

    def _fill(self) -> None:
        length = max(PROMPT, self._point.keys)
        for at in range(-(-self._point.entries // length)):
            prompt = self._new_keys(length)
            self._members[at % len(self._members)].write(prompt, nbytes=PAYLOAD_BYTES)
            self._prompts.append(prompt)
        self.machine.tick()

    def _new_keys(self, count: int) -> bytes:
        first, self._next_key = self._next_key, self._next_key + count
        # Spread as digests are, so that neighbours in a prompt are none in a dictionary.
        return b"".join((at * 0x9E3779B97F4A7C15F39CC0605CEDC835 & (1 << 128) - 1).to_bytes(KEY_BYTES, "little") for at in range(first, first + count))  # fmt: skip

    def timed(
        self, act: Callable[[], object], samples: int, *, before_each: Callable[[], object] | None = None
    ) -> list[float]:
        """Microseconds of the server's time, sample by sample."""
        microseconds = []
        for _ in range(samples):
            self.machine.now += 0.001
            if before_each is not None:
                before_each()
            before = self.machine.busy_s
            act()
            microseconds.append((self.machine.busy_s - before) * 1e6)
        return microseconds

    def _keys(self) -> bytes:
        return self._draw.choice(self._prompts)[: self._point.keys * KEY_BYTES]

    def _member(self) -> Member:
        return self._draw.choice(self._members)

    def tell_all_of_all(self) -> None:
        """A reply to an acquire or reserve lists segments that the session was not told of yet: all, the first time."""
        for member in self._members:
            member.read(self._keys())

    def acquire(self) -> None:
        """A run that is there, and its release."""
        if self._member().read(self._keys()) != self._point.keys:
            raise RuntimeError("a key is not there")

    def lookup(self) -> None:
        """The same run, looked up only."""
        if self._member().say(protocol.Lookup, self._keys(), 0.0).hits != self._point.keys:
            raise RuntimeError("a key is not there")

    def store(self) -> None:
        """A prefill step's chunks, reserved and committed."""
        self._member().write(self._new_keys(min(STEP, self._point.keys)), nbytes=PAYLOAD_BYTES)

    def heartbeat(self) -> None:
        """That of a process which has the segments of its host mapped."""
        at = self._draw.randrange(len(self._members))
        first = at // DONORS_PER_HOST * DONORS_PER_HOST
        attached = [number + 1 for number in range(first, min(first + DONORS_PER_HOST, len(self._members)))]
        self._members[at].say(protocol.Heartbeat, attached, 0, [], [])

    def join(self) -> None:
        """A hello, whose answer lists every segment, and the first heartbeat."""
        self._joined += 1
        self.machine.join(f"late-{self._joined}")

    def donate(self) -> None:
        """One more segment, of which everybody will have to be told."""
        self._joined += 1
        self.machine.join(f"late-{self._joined}", host=self._joined).donate(data_bytes=1 << 20, records=64)

    def leave(self) -> None:
        """A donor says goodbye; its entries are swept."""
        self._members.pop().say(protocol.Goodbye)
        self.machine.tick()
