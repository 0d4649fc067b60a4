"""The host: the runtime directory, the memory that segments on it come from, the functions in C."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vcache.doctor.finding import Finding, State
from vcache.errors import ConfigError
from vcache.units import approximate_size

if TYPE_CHECKING:
    from vcache.config import VCacheConfig

LIBRARIES: Final = ("vcache.transfer._copy_blocks", "vcache.pool._shared_index")
#: What container engines leave in their containers.
CONTAINER_MARKS: Final = ("/.dockerenv", "/run/.containerenv")
MOUNTS: Final = Path("/proc/self/mounts")
MEMORY_FILESYSTEMS: Final = frozenset({"tmpfs", "ramfs", "hugetlbfs"})


def examine(config: VCacheConfig) -> Iterator[Finding]:
    yield from _runtime_directory(config)
    yield from _container()
    yield _native()


def _runtime_directory(config: VCacheConfig) -> Iterator[Finding]:
    from vcache.pool.runtime_dir import RuntimeDir

    path = config.runtime_path
    try:
        RuntimeDir(path)
    except ConfigError as error:
        yield Finding("runtime directory", State.PROBLEM, str(error), "set runtime_dir to one that this user owns")
        return
    yield Finding("runtime directory", State.OK, f"{path}: processes that name it share a host's segments")
    kind = _filesystem(path)
    if kind not in MEMORY_FILESYSTEMS:
        yield Finding(
            "shared memory",
            State.NOTE,
            f"{path} is on {kind}, not in memory: the system writes segments to a disk",
            "set runtime_dir to a directory below /dev/shm",
        )
    space = os.statvfs(path)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    said = f"{approximate_size(free)} of {approximate_size(total)} are free for segments in host memory"
    if free < config.segment.size:
        yield Finding(
            "shared memory",
            State.NOTE,
            f"{said}: less than segment.size = {approximate_size(config.segment.size)}",
            "donate less, or make it larger (containers have 64 MiB unless started with --shm-size or --ipc=host)",
        )
    else:
        yield Finding("shared memory", State.OK, said)


def _container() -> Iterator[Finding]:
    if any(Path(mark).exists() for mark in CONTAINER_MARKS):
        yield Finding(
            "container",
            State.NOTE,
            "this is a container: it shares segments only with processes that have the same /dev/shm and, for CUDA IPC, the same "
            "IPC namespace",
            "start all of them with --ipc=host, or with one volume for runtime_dir",
        )


def _native() -> Finding:
    from vcache.native import native_library

    try:
        for name in LIBRARIES:
            native_library(name)
    except (ImportError, OSError) as error:
        return Finding(
            "functions in C", State.PROBLEM, str(error), "install the package again, with a C compiler at hand"
        )
    return Finding("functions in C", State.OK, "built")


def _filesystem(path: Path) -> str:
    """The kind of the file system that ``path`` is on: of the mounts above it, the last one at the deepest place."""
    found, depth = "an unknown file system", -1
    for line in MOUNTS.read_text().splitlines():
        place, kind = line.split(" ")[1:3]
        at = Path(place.replace("\\040", " "))
        if (path.resolve() == at or at in path.resolve().parents) and len(at.parts) >= depth:
            found, depth = kind, len(at.parts)
    return found
