"""Times contestants side by side: interleaved rounds, medians, paired ratios with a confidence interval.

Machines are noisy and drift: only figures of one interleaved run are compared, and a bar is judged on the paired ratio.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path

#: How far a median may miss a bar that the interval's better end reaches, and the bar still count as met.
BAR_TOLERANCE = 0.05
_BOOTSTRAP_DRAWS = 400


class Effort(Enum):
    """How many rounds to spend: enough to quote, or enough to see that a benchmark runs."""

    FULL = "full"
    QUICK = "quick"

    def rounds(self, full: int) -> int:
        """``full`` rounds, or the least that still gives a median."""
        return full if self is Effort.FULL else 3


class Better(Enum):
    """Which way a ratio is better."""

    HIGHER = "at least"
    LOWER = "at most"


@dataclass(frozen=True)
class Bar:
    """A target for the ratio to ``against`` (or for the value itself, where ``against`` is None)."""

    value: float
    better: Better

    def __str__(self) -> str:
        return f"{self.better.value} {self.value:g}"


@dataclass(frozen=True)
class Result:
    """One contestant's figure in one case. ``low``/``high`` bound the ratio (or value) at 95% confidence.

    Cases that differ in one number alone are points of one curve: ``panel`` is what they share, ``size`` the number, ``size_unit``
    what it counts.
    """

    benchmark: str
    case: str
    contestant: str
    median: float
    spread: float
    unit: str
    ratio: float | None = None
    against: str | None = None
    low: float | None = None
    high: float | None = None
    bar: Bar | None = None
    panel: str | None = None
    size: float | None = None
    size_unit: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met: the interval's better end reaches it, the median is within 5% of it. None without a bar."""
        if self.bar is None:
            return None
        middle = self.median if self.ratio is None else self.ratio
        low = middle if self.low is None else self.low
        high = middle if self.high is None else self.high
        if self.bar.better is Better.HIGHER:
            return high >= self.bar.value and middle >= self.bar.value * (1 - BAR_TOLERANCE)
        return low <= self.bar.value and middle <= self.bar.value * (1 + BAR_TOLERANCE)


def run_named(name: str, effort: Effort, traces: Sequence[Path]) -> list[Result]:
    """What the benchmark of this name finds; of the traces only replay has a use."""
    run: Callable[..., list[Result]] = import_module(f"benchmarks.{name}").run
    return run(effort, traces=traces) if name == "replay" else run(effort)


def interleave(contestants: dict[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Runs each contestant once a round, in an order shuffled anew each round; each returns its own figure."""
    order = list(contestants)
    shuffled = random.Random(0)
    for _ in range(warmup):
        for name in order:
            contestants[name]()
    figures: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            figures[name].append(contestants[name]())
    return figures


def timed(act: Callable[[], object]) -> float:
    """Seconds that the act takes."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def settled(act: Callable[[], float], nbytes: int, *, pause_s: float) -> Callable[[], float]:
    """GB/s of an act that answers the seconds it took for ``nbytes``, after a pause in which other threads come to rest."""

    def figure() -> float:
        time.sleep(pause_s)
        return nbytes / act() / 1e9

    return figure


def spread(figures: Sequence[float]) -> float:
    """The interquartile range: half of all rounds lie within it."""
    if len(figures) < 2:
        return 0.0
    quartiles = statistics.quantiles(figures, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def paired_ratio(figures: Sequence[float], against: Sequence[float]) -> tuple[float, float, float]:
    """Median of the round-by-round ratios, with the bounds of its 95% bootstrap interval."""
    ratios = [a / b for a, b in zip(figures, against, strict=True)]
    middle = statistics.median(ratios)
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAP_DRAWS))
    return middle, medians[int(0.025 * _BOOTSTRAP_DRAWS)], medians[int(0.975 * _BOOTSTRAP_DRAWS) - 1]


def compare(
    benchmark: str,
    case: str,
    figures: dict[str, list[float]],
    *,
    unit: str,
    against: str,
    bars: dict[str, Bar] | None = None,
) -> list[Result]:
    """A result per contestant, each with its paired ratio to ``against``."""
    return [
        Result(benchmark, case, name, statistics.median(own), spread(own), unit)
        if name == against
        else judge(benchmark, case, figures, name, unit=unit, against=against, bar=(bars or {}).get(name))
        for name, own in figures.items()
    ]


def judge(
    benchmark: str,
    case: str,
    figures: dict[str, list[float]],
    contestant: str,
    *,
    unit: str,
    against: str,
    bar: Bar | None = None,
) -> Result:
    """One contestant's result beside ``against``, both of the same interleaved rounds."""
    own = figures[contestant]
    ratio, low, high = paired_ratio(own, figures[against])
    return Result(
        benchmark, case, contestant, statistics.median(own), spread(own), unit, ratio, against, low, high, bar
    )
