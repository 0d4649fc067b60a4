"""What lies below and beside the pool: the store's directory or master, and the packages that they need."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vcache.doctor.finding import Finding, State
from vcache.errors import ConfigError

if TYPE_CHECKING:
    from vcache.config import VCacheConfig


def examine(config: VCacheConfig, *, timeout_s: float) -> Iterator[Finding]:
    kind = config.store.resolved_kind
    if kind == "files":
        yield _directory(Path(config.store.files.directory))
    elif kind == "mooncake":
        yield _master(config.store.mooncake.master, timeout_s)
    else:
        yield Finding("store", State.OK, "none is configured: what the pool evicts is computed again")
    for missing in not_installed(config):
        yield Finding("Mooncake", State.PROBLEM, missing)


def not_installed(config: VCacheConfig) -> Iterator[str]:
    """Settings that need a package that is not there, each with what to do."""
    from vcache.store.mooncake_command import require_mooncake

    for setting, value in (("store.kind", config.store.resolved_kind), ("transfer.remote", config.transfer.remote)):
        if value == "mooncake":
            try:
                require_mooncake(f"use another {setting}")
            except ConfigError as error:
                yield f"{setting} = 'mooncake': {error}"


def _directory(path: Path) -> Finding:
    where = path if path.exists() else path.parent  # the store makes the last part of the path itself
    if not where.is_dir():
        return Finding("store", State.PROBLEM, f"{where} is no directory", "create or mount it")
    if not os.access(where, os.W_OK | os.X_OK):
        return Finding("store", State.PROBLEM, f"{where}: this user may not write there", "change its owner or mode")
    return Finding("store", State.OK, f"files in {path}")


def _master(address: str, timeout_s: float) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        return Finding(
            "store",
            State.PROBLEM,
            f"no Mooncake master takes connections at {address}: {error}",
            "run `vcache mooncake start`",
        )
    return Finding("store", State.OK, f"a Mooncake master takes connections at {address}")
