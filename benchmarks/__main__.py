"""``python -m benchmarks [NAME…]``: runs, shows, writes, and fails on a missed bar."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.contestants import end_when_told
from benchmarks.measure import Effort, Result, run_named
from benchmarks.report import as_markdown, show, write_json
from vcache.ending import termination_as_interrupt
from vcache.errors import UnavailableError

#: In the order of the table: a module of this package each, with ``run(effort) -> list[Result]``.
BENCHMARKS = (
    "pool",
    "store",
    "remote",
    "lookup",
    "lmcache",
    "server",
    "evict",
    "replay",
    "scale",
    "copies",
    "scheduler",
    "serving",
)
#: Run only when they are named.
ON_REQUEST = ("gpu",)
#: Columns of the table where no terminal says how wide it is.
PLAIN_WIDTH = 160
#: What shells say of a command that Ctrl-C ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named benchmarks (by default all but those ``ON_REQUEST``). Exit status: 0 all bars met, 1 one missed, 2 bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = (*BENCHMARKS, *ON_REQUEST)
    names = [name for name in options.names if name in known]
    files = [Path(name) for name in options.names if name not in known]
    if files and names != ["replay"]:
        parser.error(f"unknown benchmark {files[0].name!r}; there are: {', '.join(known)}; files go with replay alone")
    traces = [*options.trace, *files]
    absent = [path for path in traces if not path.is_file()]
    if absent:
        parser.error(f"no such trace: {absent[0]}")
    for path in (options.json, options.markdown):
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            parser.error(f"{path} cannot be written")  # now, not when all is measured and would be lost
    effort = Effort.QUICK if options.quick else Effort.FULL
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    try:
        with termination_as_interrupt():
            results = _measured(names or BENCHMARKS, effort, traces)
    except UnavailableError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("vcache bench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    show(results, console)
    if options.json:
        write_json(results, options.json)
    if options.markdown:
        options.markdown.write_text(as_markdown(results))
    if options.plots:
        from benchmarks.plots import draw

        draw(results, options.plots)
    missed = [r for r in results if r.met is False]
    for r in missed:
        console.print(f"[bold red]missed[/]: {r.benchmark}, {r.case}, {r.contestant}: bar {r.bar}")
    return 1 if missed and effort is Effort.FULL else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vcache bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which to run: {', '.join(BENCHMARKS)} (default: all of these); {', '.join(ON_REQUEST)}, where there is one; "
        "after replay, files of traces",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a trace for replay (may be repeated; default: a generated one)",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that everything runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw the results as PNG files")
    return parser


def _measured(names: Sequence[str], effort: Effort, traces: Sequence[Path]) -> list[Result]:
    """The results of the named benchmarks, one after the other; says on stderr where it is.

    Each runs in a process of its own: what one leaves behind, threads of its peers and memory in pieces, slows down no other.
    """
    results: list[Result] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=f"measuring {name} …")
            progress.console.print(f"measuring {name} …")
            begin = time.monotonic()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_when_told) as process:
                try:
                    results += process.submit(run_named, name, effort, traces).result()
                except KeyboardInterrupt:
                    for child in active_children():
                        child.terminate()
                    raise
            progress.advance(task)
            progress.console.print(f"{name}: {time.monotonic() - begin:.0f} s")
        progress.update(task, description="measured")
    return results


if __name__ == "__main__":
    sys.exit(main())
