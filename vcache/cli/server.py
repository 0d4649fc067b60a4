"""``vcache server``: becomes the metadata server's process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vcache.cli.options import ConfigFile, Settings, load_config
from vcache.errors import ConfigError

if TYPE_CHECKING:
    from vcache.config import VCacheConfig


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
    _check_socket_path(config)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    command = [sys.executable, "-m", "vram_metadata_server"]
    sys.stdout.flush()
    os.execve(command[0], command, environment | config.environment())


def _check_socket_path(config: VCacheConfig) -> None:
    """Refuses a path where something else lies: binding would remove it."""
    path = Path(config.endpoint.removeprefix("ipc://"))
    if config.endpoint.startswith("ipc://") and path.exists() and not path.is_socket():
        raise ConfigError(
            f"server.endpoint = {config.endpoint!r}: {path} is there and no socket; use another path, or remove it"
        )
