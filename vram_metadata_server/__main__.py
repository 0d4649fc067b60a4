"""``python -m vram_metadata_server [CONFIG_FILE]``: the metadata server as a process, until SIGTERM or Ctrl-C.

Exit status 2: the configuration cannot work; 1: the endpoint cannot be had (another server serves it).
"""

from __future__ import annotations

import sys

from vcache import log
from vcache.config import VCacheConfig
from vcache.errors import ConfigError, UnavailableError
from vram_metadata_server.server import serve


def main(arguments: list[str]) -> int:
    """Serves; answers the exit status."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m vram_metadata_server [CONFIG_FILE]   (settings also by VCACHE_*)", file=sys.stderr)
        return 2
    try:
        config = VCacheConfig.load(*arguments)
        log.configure(config.log_level, "server")
        serve(config)
    except ConfigError as error:
        print(f"vram_metadata_server: {error}", file=sys.stderr)
        return 2
    except UnavailableError as error:
        print(f"vram_metadata_server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
