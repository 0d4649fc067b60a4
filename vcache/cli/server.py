"""``vcache server``: becomes the metadata server's process."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vcache.cli.options import ConfigFile, Settings, load_config


def server(
    config_file: ConfigFile = None,
    settings: Settings = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to listen: ipc:///PATH or tcp://HOST:PORT.")
    ] = None,
) -> None:
    """Run the metadata server until it is told to end (SIGTERM or Ctrl-C)."""
    from vcache.curve import server_key_pair
    from vcache.settings_sources import ENV_PREFIX

    config = load_config(config_file, settings, server__endpoint=endpoint)
    server_key_pair(config)  # refuses an endpoint beyond this host without keys, here where the message is seen
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    command = [sys.executable, "-m", "vram_metadata_server"]
    sys.stdout.flush()
    os.execve(command[0], command, environment | config.environment())
