"""``vcache doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vcache.cli.options import ConfigFile, Settings, duration, load_config

if TYPE_CHECKING:
    from vcache.doctor import Finding

EXIT_PROBLEMS: Final = 1
_STYLES: Final = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    config_file: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    timeout: Annotated[str, typer.Option(metavar="DURATION", help="How long to wait for each answer.")] = "3s",
) -> None:
    """Examine this machine, the pool and the store; what to do where something does not work. Exit status 1 if so."""
    from vcache.doctor import State, examine

    timeout_s = duration(timeout, "--timeout")
    findings = list(examine(load_config(config_file, settings), timeout_s=timeout_s))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.state is State.PROBLEM for finding in findings):
        raise typer.Exit(EXIT_PROBLEMS)


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from vcache.cli.options import table_console

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("about", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        style = _STYLES[finding.state]
        table.add_row(Text(finding.state, style), finding.about, finding.detail)
        if finding.fix:
            table.add_row("", "", Text(f"→ {finding.fix}", style))
    table_console().print(table, highlight=False)
