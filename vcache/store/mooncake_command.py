"""How to start Mooncake's own programs, and what their environment must say. Starts nothing itself."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Final

import vcache
from vcache.errors import ConfigError

#: While a reader's lease runs its object cannot be removed or evicted; long enough for any load.
LEASE_MS: Final = 5000
#: Objects of an owner that died are known as gone after this.
CLIENT_TTL_S: Final = 10


def require_mooncake(otherwise: str = "use another store.kind") -> Path:
    """Where Mooncake is installed. Raises ``ConfigError`` when it is not."""
    found = importlib.util.find_spec("mooncake")
    if found is None or found.origin is None:
        raise ConfigError(f"Mooncake is not installed; `pip install '.[mooncake]'`, or {otherwise}")
    return Path(found.origin).parent


def master_command(*, host: str, port: int, metrics_port: int) -> list[str]:
    """The command of a master that listens on ``host`` only (left to itself it listens everywhere)."""
    return [
        str(require_mooncake() / "mooncake_master"),
        f"--rpc_address={host}",
        f"--rpc_port={port}",
        f"--metrics_host={host}",
        f"--metrics_port={metrics_port}",
        f"--default_kv_lease_ttl={LEASE_MS}",
        f"--client_ttl={CLIENT_TTL_S}",
        "--eviction_high_watermark_ratio=0.95",
        "--logtostderr",
        "--minloglevel=1",
    ]


def address_towards(master: str) -> str:
    """The address of this host that packets to ``master`` leave from: the one by which its neighbours can reach it."""
    host, _, port = master.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # of a datagram socket: sends nothing
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def mooncake_environment(hostname: str, timeout_s: float = 1.0) -> dict[str, str]:
    """The environment of a process that uses Mooncake, which reads its time-outs there, at import. What is set stays.

    Whole seconds are the least that most of them know. Without them a hung owner holds a transfer for 30 s, and ``setup``
    retries for 90.
    """
    rpc_ms = str(max(50, int(timeout_s * 400)))
    defaults = {
        "MC_RPC_TIMEOUT_MS": rpc_ms,
        "MC_RPC_CONNECT_TIMEOUT_MS": rpc_ms,
        "MC_TRANSFER_TIMEOUT": "1",
        "MC_TCP_STATUS_TIMEOUT_SEC": "1",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "1",
        "MC_HANDSHAKE_CONNECT_TIMEOUT": "1",
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        # The address that a metadata server tells others; else it is that of this host's first interface. It binds nothing:
        # Mooncake 0.3.13 listens on all interfaces, whatever it is told.
        "MC_TCP_BIND_ADDRESS": hostname,
        "MC_LOG_LEVEL": "ERROR",
        "GLOG_minloglevel": "2",
    }
    search = [str(Path(vcache.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return defaults | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(search)}
