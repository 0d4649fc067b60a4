"""One server per endpoint: the lock beside its socket, and the last term in it.

ZeroMQ lets a second bind on an ipc path silently steal the socket, so a lock file decides who serves. It stays when the
server ends: it holds the last term, and terms never go back, whatever the clock does.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

from vcache.config import VCacheConfig
from vcache.errors import ConfigError, UnavailableError
from vcache.pool.runtime_dir import HeldFile, RuntimeDir, lock_file

log = logging.getLogger(__name__)

_IPC: Final = "ipc://"
_MAX_TERM: Final = 1 << 42  # milliseconds: the year 2109


class EndpointLock:
    """Held while this process serves ``config.endpoint``. ``term`` is this life's, already written down.

    Raises ``UnavailableError`` when another server holds the endpoint; ``ConfigError`` when its directory cannot be used, or
    something else than a socket lies there: binding would remove it.
    """

    def __init__(self, config: VCacheConfig) -> None:
        self.socket_path = _socket_path(config.endpoint)
        if self.socket_path is not None:
            if self.socket_path.exists() and not self.socket_path.is_socket():
                raise ConfigError(
                    f"server.endpoint = {config.endpoint!r}: {self.socket_path} is there and no socket; use another path, or "
                    "remove it"
                )
            own = f"the directory of server.endpoint = {config.endpoint!r}" if config.server.endpoint else ""
            RuntimeDir(self.socket_path.parent, named_by=own)
            path = self.socket_path.with_name(self.socket_path.name + ".lock")
        else:
            name = "".join(letter if letter.isalnum() else "-" for letter in config.endpoint)
            path = RuntimeDir(config.runtime_path).path / f"server-{name}.lock"
        held = lock_file(path)
        if held is None:
            raise UnavailableError(
                f"a metadata server is already serving {config.endpoint} (it holds {path}); stop it first, or set "
                "server.endpoint to another address"
            )
        self._held: HeldFile = held
        self.term = max(time.time_ns() // 1_000_000, self._last_term() + 1)
        os.pwrite(held.fd, f"{self.term:<20d}\n".encode(), 0)
        os.fsync(held.fd)

    def _last_term(self) -> int:
        text = os.pread(self._held.fd, 64, 0).split()
        if text and text[0].isdigit() and int(text[0]) < _MAX_TERM:
            return int(text[0])
        if text:
            log.warning("%s holds no term: taking the clock's", self._held.path)
        return 0

    def close(self) -> None:
        """Removes the socket, which only the holder of the lock may do, and gives up the endpoint."""
        if self.socket_path is not None and self.socket_path.is_socket():
            self.socket_path.unlink(missing_ok=True)
        self._held.close()


def _socket_path(endpoint: str) -> Path | None:
    return Path(endpoint.removeprefix(_IPC)) if endpoint.startswith(_IPC) else None
