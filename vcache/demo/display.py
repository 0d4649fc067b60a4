"""How the demo looks on a terminal (or in a log, where a spinner would be noise)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vcache.demo.figures import DemoReport, EngineFigures, gb_per_s


class Display:
    """Says what happens now, and at the end what came out."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """One step of the story; gives a function that says what the step is busy with."""
        started = time.monotonic()
        live = self._console.is_terminal
        with self._console.status(title) if live else _nothing() as status:

            def stage(text: str) -> None:
                if status is not None:
                    status.update(f"{title}: {text}")
                else:
                    self._console.print(f"  {title}: {text}", highlight=False, soft_wrap=True)

            if not live:
                self._console.print(f"{title} ...", highlight=False, soft_wrap=True)
            yield stage
        took = f"[dim]{time.monotonic() - started:5.1f} s[/]"
        self._console.print(f"[green]done[/] {took}  {title}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the steps."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def quote(self, text: str) -> None:
        """What others printed, as it is: brackets in it are no markup."""
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def report(self, report: DemoReport) -> None:
        """The figures of every engine, and the verdict."""
        self._console.print(_engines(report))
        for line in _remarks(report):
            self.note(line)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _engines(report: DemoReport) -> Table:
    """A line per answer; what only one form of the demo measures has a column only there."""
    has_model = report.reference is not None
    table = Table(
        title="The prompt's tokens, answer by answer", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("engine", no_wrap=True)
    for column in ("computed", "loaded"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for column in ("MiB", "GB/s", "TTFT" if has_model else "of memcpy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("tokens" if has_model else "bytes", no_wrap=True)
    if report.reference is not None:
        table.add_row(*_cells(report.reference), "reference")
    for engine in report.engines:
        table.add_row(*_cells(engine), "[green]identical[/]" if engine.identical else "[red]NOT identical[/]")
    return table


def _cells(engine: EngineFigures) -> tuple[str, ...]:
    nbytes, seconds = engine.bytes_loaded or engine.bytes_stored, engine.load_s or engine.store_s
    last = "-"
    if engine.ttft_s is not None:
        last = f"{engine.ttft_s * 1000:.0f} ms"
    elif engine.bandwidth is not None:
        last = f"{engine.bandwidth.ratio:.2f}"
    return (
        engine.name,
        str(engine.tokens_computed),
        str(engine.tokens_loaded),
        engine.place or "-",
        f"{nbytes / 2**20:.1f}" if nbytes else "-",
        f"{gb_per_s(nbytes, seconds):.2f}" if nbytes else "-",
        last,
    )


def _remarks(report: DemoReport) -> Iterator[str]:
    first, *others = report.engines
    if report.reference is not None:
        computing = min(run.ttft_s or 0.0 for run in (report.reference, first))
        times = ", ".join(
            f"{computing / run.ttft_s:.1f} from {run.place}" for run in others if run.ttft_s and run.place
        )
        yield f"time to first token, times shorter than the faster of the runs that computed: {times or '-'}"
    elif first.bandwidth is not None:
        yield (
            f"memcpy is torch copy_ of the same bytes, in turns with each move: {first.bandwidth.threads} threads, "
            f"medians of {first.bandwidth.rounds} rounds"
        )
    for engine in others:
        if engine.source != engine.expected or engine.tokens_loaded != report.loadable:
            yield (
                f"[red]not as it should be[/]: {engine.name} loaded {engine.tokens_loaded} tokens from "
                f"{engine.place or 'nowhere'}, instead of {report.loadable} from {engine.expected}"
            )
    what = (
        "the tokens generated are those of vLLM without VCache" if report.reference else "every byte is the byte stored"
    )
    yield f"[green]identical[/]: {what}" if report.identical else f"[red]NOT identical[/]: it is not so that {what}"
    if report.passed:
        yield f"[green]loaded[/]: {report.loadable} of {report.prompt_tokens} prompt tokens, from {_listed(others)}"


def _listed(engines: list[EngineFigures]) -> str:
    *places, last = (engine.place for engine in engines)
    return f"{', '.join(places)} and {last}"
