"""The command line as a whole: which commands there are, and what their failures look like.

Exit status: 0 done; 1 it failed; 2 the command line or the configuration is wrong; 3 no metadata server answers.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vcache
from vcache.cli import bench, config, demo, doctor, donate, keys, mooncake, server, status
from vcache.errors import ConfigError, VCacheError

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="vcache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vcache {vcache.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pools the spare VRAM of many GPUs into one cache tier for LLM key/value blocks."""


app.command()(server.server)
app.command()(donate.donate)
app.command()(status.status)
app.command()(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(mooncake.app, name="mooncake")
app.command()(keys.keys)
app.command()(demo.demo)
app.command(context_settings=bench.PASS_THROUGH, add_help_option=False)(bench.bench)


def run() -> None:
    """Runs the command that the process's arguments name, and ends the process."""
    try:
        app()
    except VCacheError as error:
        print(f"vcache: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
