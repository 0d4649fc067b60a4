"""The settings of the store below the pool (``store.*``), and which kind of store they add up to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vcache.setting_types import Count, Seconds, SecondsOrNever, Section, Size


class GuardConfig(Section):
    """How long the store may take, and when it is left alone."""

    timeout: Seconds = 1.0
    write_timeout: Seconds = 10.0
    threads: Annotated[Count, Field(ge=1, le=256)] = 4
    write_threads: Annotated[Count, Field(ge=1, le=256)] = 2
    retries: Annotated[Count, Field(ge=0, le=10)] = 3
    retry_delay: Seconds = 0.05
    failures: Annotated[Count, Field(ge=1, le=1000)] = 3
    probe_interval: Seconds = 1.0
    max_probe_interval: Seconds = 30.0


class FilesConfig(Section):
    """A directory on a local disk or a shared mount."""

    directory: str = ""
    size_limit: Annotated[Size, Field(ge=1 << 20)] = 64 << 30


class MooncakeConfig(Section):
    """A Mooncake store: its master, how bytes travel, what this process gives to it."""

    master: str = ""
    metadata: str = "P2PHANDSHAKE"
    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""
    hostname: str = ""
    segment_size: Size = 0
    replicas: Annotated[Count, Field(ge=1, le=64)] = 1
    soft_pin: SecondsOrNever = 0.0
    key_prefix: str = "vcache"


class StoreConfig(Section):
    """What lies below the pool."""

    kind: Literal["auto", "none", "files", "mooncake"] = "auto"
    staging_size: Annotated[Size, Field(ge=1 << 20)] = 256 << 20
    write_policy: Literal["all", "hot", "evicted", "none"] = "all"
    hot_hits: Annotated[Count, Field(ge=1, le=1000)] = 2
    queue_bytes: Size = 1 << 30
    queue_items: Annotated[Count, Field(ge=1, le=1 << 20)] = 4096
    guard: GuardConfig = Field(default_factory=GuardConfig)
    files: FilesConfig = Field(default_factory=FilesConfig)
    mooncake: MooncakeConfig = Field(default_factory=MooncakeConfig)

    @property
    def resolved_kind(self) -> Literal["none", "files", "mooncake"]:
        """``kind``, with "auto" decided: Mooncake when a master is named, files when a directory is, else none."""
        if self.kind != "auto":
            return self.kind
        if self.mooncake.master:
            return "mooncake"
        return "files" if self.files.directory else "none"

    def problems(self) -> Iterator[str]:
        """What contradicts what, in words for a ``ConfigError``."""
        if self.kind == "files" and not self.files.directory:
            yield "store.kind = 'files': needs store.files.directory, such as /mnt/shared/vcache"
        if self.files.directory and not Path(self.files.directory).is_absolute():
            yield f"store.files.directory = {self.files.directory!r}: must be an absolute path, such as /mnt/shared/vcache"
        if self.kind == "mooncake" and not self.mooncake.master:
            yield "store.kind = 'mooncake': needs store.mooncake.master, such as 127.0.0.1:50051"
        elif self.resolved_kind == "mooncake":
            yield from self._mooncake_problems()
        if self.guard.max_probe_interval < self.guard.probe_interval:
            yield (
                f"store.guard.max_probe_interval = {self.guard.max_probe_interval:g}s: must not be below "
                f"store.guard.probe_interval = {self.guard.probe_interval:g}s"
            )

    def problems_here(self) -> Iterator[str]:
        """What this machine lacks for it, in words for a ``ConfigError``. Looks at the disk, which may hang with a mount."""
        directory = Path(self.files.directory)
        if self.resolved_kind == "files" and not directory.is_dir() and not directory.parent.is_dir():
            yield (
                f"store.files.directory = {self.files.directory!r}: {directory.parent} is not there, and only the last level is "
                "made by itself; mount it, or make it"
            )

    def _mooncake_problems(self) -> Iterator[str]:
        host, colon, port = self.mooncake.master.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
            yield f"store.mooncake.master = {self.mooncake.master!r}: must be HOST:PORT, such as 127.0.0.1:50051"
        prefix = self.mooncake.key_prefix
        if not prefix or not prefix.isascii() or not all(letter.isalnum() or letter in "-_." for letter in prefix):
            yield f"store.mooncake.key_prefix = {prefix!r}: use letters, digits, '-', '_' and '.', at least one"
        if self.mooncake.protocol == "rdma" and not self.mooncake.devices:
            yield "store.mooncake.protocol = 'rdma': needs store.mooncake.devices, such as mlx5_0 (`ibv_devices` lists them)"
