"""How the demo looks on a terminal (or in a log, where a spinner would be noise)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vcache.demo.figures import Bandwidth, DemoReport, EngineFigures, gb_per_s


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

    def report(self, report: DemoReport) -> None:
        """The figures of every engine, and the verdict."""
        self._console.print(_engines(report))
        for name, figures in (("store", report.store), ("retrieve", report.retrieve)):
            if figures is not None:
                self.note(_bandwidth(name, figures))
        for line in _verdict(report):
            self.note(line)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _engines(report: DemoReport) -> Table:
    table = Table(
        title="What each step did, in tokens of the prompt", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("step", no_wrap=True)
    for column in ("device", "computed", "loaded", "from", "MiB", "GB/s", "TTFT"):
        table.add_column(column, justify="right", no_wrap=True)
    for engine in ([report.reference] if report.reference else []) + report.engines:
        table.add_row(
            engine.name,
            engine.device,
            str(engine.tokens_computed),
            str(engine.tokens_loaded),
            engine.source or "-",
            *_moved(engine),
            "-" if engine.ttft_s is None else f"{engine.ttft_s * 1000:.0f} ms",
        )
    return table


def _moved(engine: EngineFigures) -> tuple[str, str]:
    moves = [
        (verb, nbytes, seconds)
        for verb, nbytes, seconds in (
            ("out", engine.bytes_stored, engine.store_s),
            ("in", engine.bytes_loaded, engine.load_s),
        )
        if nbytes
    ]
    return (
        "\n".join(f"{nbytes / 2**20:.1f} {verb}" for verb, nbytes, _ in moves) or "-",
        "\n".join(f"{gb_per_s(nbytes, seconds):.1f}" for _, nbytes, seconds in moves) or "-",
    )


def _bandwidth(name: str, figures: Bandwidth) -> str:
    return (
        f"{name}: {figures.gb_s:.2f} GB/s, {figures.ratio:.2f} of memcpy (torch copy_ of the same bytes: "
        f"{figures.copy_gb_s:.2f} GB/s; {figures.threads} threads, median of {figures.rounds} rounds in turns)"
    )


def _verdict(report: DemoReport) -> Iterator[str]:
    second = report.engines[-1]
    if report.reference is not None and second.ttft_s:
        computing = [run.ttft_s for run in (report.reference, *report.engines[:-1]) if run.ttft_s]
        yield f"time to first token: {min(computing) / second.ttft_s:.1f} times shorter than the faster of the runs that computed"
    what = "the tokens generated are those of the run without VCache"
    if report.reference is None:
        what = "every byte loaded is the byte that was stored"
    yield f"[green]identical[/]: {what}" if report.identical else f"[red]NOT identical[/]: it is not so that {what}"
    if report.loaded:
        yield f"[green]loaded[/]: {report.loaded} of {report.prompt_tokens} prompt tokens came from the segment on {second.source}"
    else:
        yield "[red]nothing was loaded[/]: the second engine found nothing in the pool"
