"""The command line as a whole: which commands there are, and what their failures look like.

Exit status: 0 done; 1 it failed; 2 the command line or the configuration is wrong; 3 no metadata server answers.
"""

from __future__ import annotations

import sys

import typer

from vcache.cli import bench, config, demo, donate, keys, mooncake, server, status
from vcache.errors import ConfigError, UnavailableError, VCacheError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3

app = typer.Typer(
    name="vcache",
    help="Pools the spare VRAM of many GPUs into one cache tier for LLM key/value blocks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(server.server)
app.command()(donate.donate)
app.command()(status.status)
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
        sys.exit(_status_of(error))


def _status_of(error: VCacheError) -> int:
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, UnavailableError) else EXIT_FAILED
