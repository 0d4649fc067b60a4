"""``vcache config``: checks a file of settings, shows what is in force and where each value came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vcache.cli.options import ConfigFile, Settings, load_config
from vcache.doctor.stores import not_installed
from vcache.errors import ConfigError

if TYPE_CHECKING:
    from vcache.config import VCacheConfig

app = typer.Typer(help="Check and show settings.", no_args_is_help=True)


@app.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of settings.")]) -> None:
    """Check a file as this machine's environment completes it; print the result. Exit status 2 if it cannot work."""
    from vcache.curve import key_problems

    config = load_config(file)
    problems = [*config.store.problems_here(), *key_problems(config), *not_installed(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    _print(config)
    typer.echo(f"{file}: ok")


@app.command()
def show(
    config_file: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: {name: {value, origin}}.")] = False,
) -> None:
    """Show every setting, its value and where that came from."""
    config = load_config(config_file, settings)
    if as_json:
        typer.echo(json.dumps({name: {"value": value, "origin": origin} for name, value, origin in config.settings()}))
    else:
        _print(config)


def _print(config: VCacheConfig) -> None:
    from rich.table import Table

    from vcache.cli.options import table_console

    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for name, value, origin in config.settings():
        table.add_row(name, "''" if value == "" else str(value), origin, style="dim" if origin == "default" else "bold")
    table.add_section()
    table.add_row("(endpoint)", config.endpoint, "in force")
    table.add_row("(runtime directory)", str(config.runtime_path), "in force")
    table_console().print(table)
