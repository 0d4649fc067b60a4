"""The demo's Mooncake store: a master and one owner of memory, as ``vcache mooncake start`` has them."""

from __future__ import annotations

import socket
from typing import Final

from vcache.demo.processes import Stage
from vcache.store.mooncake_command import master_command, mooncake_environment

HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 60.0


class Mooncake:
    """A store with room for ``nbytes``; it starts when this is made, and serves once ``await_ready`` has returned."""

    def __init__(self, stage: Stage, *, nbytes: int) -> None:
        """Raises ``ConfigError`` when Mooncake is not installed."""
        port, metrics_port = _free_ports()
        self.address: Final = f"{HOST}:{port}"
        self._stage = stage
        environment = mooncake_environment(HOST)
        master = master_command(host=HOST, port=port, metrics_port=metrics_port)
        stage.run("Mooncake master", master, environment=environment)
        arguments = (self.address, str(nbytes), HOST, "P2PHANDSHAKE", "tcp")
        self._owner = stage.start("Mooncake owner", "vcache.store.mooncake_owner", *arguments, environment=environment)

    def await_ready(self) -> None:
        """Raises ``ChildFailed`` or ``UnavailableError``."""
        self._stage.wait_until(
            lambda: "ready: " in self._owner.log_tail(), what="Mooncake to be ready", timeout_s=START_TIMEOUT_S
        )


def _free_ports() -> tuple[int, int]:
    """Two ports that nobody uses now; both are held until both are known."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind((HOST, 0))
        return first.getsockname()[1], second.getsockname()[1]
