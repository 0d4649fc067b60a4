"""``vcache bench``: runs the benchmarks of this checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure VCache on this machine (needs a checkout; arguments go to the benchmarks, try --help)."""
    import vcache

    checkout = Path(vcache.__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        typer.echo("vcache bench: the benchmarks are part of a checkout, not of the installed package", err=True)
        raise typer.Exit(1)
    search = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *context.args]
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | {"PYTHONPATH": search})
