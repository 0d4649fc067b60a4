"""``python -m benchmarks [NAME…] [--quick] [--json FILE] [--markdown FILE]``: runs, shows, and fails on a missed bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.measure import Effort, Result
from benchmarks.report import as_markdown, show, write_json

#: In the order of the table: a module of this package each, with ``run(effort) -> list[Result]``.
BENCHMARKS = ("pool", "server", "copies")
#: Columns of the table where no terminal says how wide it is.
PLAIN_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named benchmarks (all by default). Exit status: 0 all bars met, 1 one missed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="vcache bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that everything runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    effort = Effort.QUICK if options.quick else Effort.FULL
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    progress = Console(stderr=True)
    results: list[Result] = []
    for name in options.names or BENCHMARKS:
        with progress.status(f"measuring {name} …"):
            results += import_module(f"benchmarks.{name}").run(effort)
    show(results, console)
    if options.json:
        write_json(results, options.json)
    if options.markdown:
        options.markdown.write_text(as_markdown(results))
    missed = [r for r in results if r.met is False]
    for r in missed:
        console.print(f"[bold red]missed[/]: {r.benchmark}, {r.case}, {r.contestant}: bar {r.bar}")
    return 1 if missed and effort is Effort.FULL else 0


if __name__ == "__main__":
    sys.exit(main())
