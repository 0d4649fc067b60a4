"""Draws results as PNG files, one a benchmark: curves where cases differ in a number, bars elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measure import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS: Final = 2
_PANEL_WIDTH, _PANEL_HEIGHT = 6.5, 3.6  # inches
_BAR_HEIGHT: Final = 0.22  # inches
_DPI: Final = 110
#: Curves so far apart are drawn on a logarithmic axis.
_DECADES: Final = 100


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Writes ``<benchmark>.png`` for each benchmark among the results; the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, own in groupby(results, key=lambda result: result.benchmark.split(":")[0]):
        written.append(directory / f"{name}.png")
        _figure(name, list(own), written[-1])
    return written


def _figure(name: str, results: Sequence[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        panels[result.benchmark, result.panel or "", result.unit].append(result)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(
        len({r.case for r in own if r.size is None}) * len({r.contestant for r in own}) for own in panels.values()
    )
    height = max(_PANEL_HEIGHT, 1.2 + longest * _BAR_HEIGHT)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * _PANEL_WIDTH, rows * height), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, ((benchmark, panel, unit), own) in zip(axes.flat, panels.items(), strict=False):
        ax.set_title(f"{benchmark}, {panel}" if panel else benchmark, fontsize=10)
        if own[0].size is not None:
            _curves(ax, own, unit)
        else:
            _bars(ax, own, unit)
    figure.suptitle(f"vcache bench {name}", fontsize=12)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _curves(ax: Axes, results: Sequence[Result], unit: str) -> None:
    lines: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        lines[result.contestant].append(result)
    for contestant, points in lines.items():
        sizes = [point.size for point in points]
        medians = [point.median for point in points]
        above = [point.spread / 2 for point in points]
        below = [min(half, median) for half, median in zip(above, medians, strict=True)]
        ax.errorbar(sizes, medians, yerr=[below, above], marker="o", markersize=4, capsize=2, label=contestant)  # type: ignore[arg-type]
    ax.set_xscale("log", base=2 if all(_is_power_of_two(result.size) for result in results) else 10)
    ax.set_xlabel(results[0].size_unit or "")
    ax.set_ylabel(unit)
    shown = [result.median for result in results]
    if min(shown) > 0 and max(shown) > _DECADES * min(shown):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _bars(ax: Axes, results: Sequence[Result], unit: str) -> None:
    """Each contestant once a case: a result judged against several is one bar."""
    once: dict[tuple[str, str], Result] = {}
    for result in results:
        once.setdefault((result.case, result.contestant), result)
    contestants = list(dict.fromkeys(result.contestant for result in results))
    shown = list(once.values())
    colours: list[Any] = [f"C{contestants.index(result.contestant)}" for result in shown]
    labels = [f"{result.case}: {result.contestant}" for result in shown]
    ax.barh(range(len(shown)), [r.median for r in shown], xerr=[r.spread / 2 for r in shown], color=colours)
    ax.set_yticks(range(len(shown)), labels, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.grid(axis="x", alpha=0.3)


def _is_power_of_two(size: float | None) -> bool:
    return size is not None and size >= 1 and float(size).is_integer() and int(size).bit_count() == 1
