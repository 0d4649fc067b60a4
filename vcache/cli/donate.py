"""``vcache donate``: a stand-alone donor, whose segment outlives every serving process."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from vcache.cli.options import ConfigFile, Settings, load_config

logger = logging.getLogger(__name__)


def donate(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Whose memory: cuda:0, cpu:0, ...")],
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="How much: 8GiB (default: segment.size).")] = None,
    label: Annotated[str, typer.Option(metavar="TEXT", help="A name for `vcache status`.")] = "",
    config_file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Give a segment of a device's memory to the pool until told to end (SIGTERM or Ctrl-C)."""
    config = load_config(config_file, settings, segment__size=size)
    raise NotImplementedError
