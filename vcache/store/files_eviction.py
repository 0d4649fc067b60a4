"""Keeps a directory of objects below its size limit and free of what dead writers left, together with other processes.

Nobody holds an index: now and then one process looks through the directory, under a lock if the file system has them, and
removes the least recently used files. Between such looks each process counts only what it wrote itself, so the limit may be
exceeded for a moment, by at most a twentieth for each process that writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vcache.failures import FailureLog

logger = logging.getLogger(__name__)

#: The directory's name carries the format's version: a new one starts beside it.
OBJECTS: Final = "vcache-objects-1"
SUFFIX: Final = ".kv"
TEMPORARY: Final = ".tmp"
#: Down to which part of the limit a sweep makes room, so that not every write needs one.
LOW_WATERMARK: Final = 0.9
#: A process sweeps after writing this part of the limit.
SWEEP_AFTER: Final = 0.05
#: Where files cannot be locked only age tells that a writer is dead: one that is not then fails to rename, no more.
UNLOCKABLE_STALE_S: Final = 3600.0

FILES_COUNTERS: Final = {
    "store_evicted_objects": "files removed to stay below the size limit",
    "store_evicted_bytes": "their size",
    "store_stale_removed": "files removed that a writer left half-written when it died",
    "store_sweeps": "times the directory was looked through",
}


class StoredFile(NamedTuple):
    used_at: float
    nbytes: int
    path: str


def lock_while_writing(file: int) -> None:
    """Marks a half-written file as having a living writer, for as long as ``file`` is open."""
    with contextlib.suppress(OSError):  # a file system without locks: see UNLOCKABLE_STALE_S
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Sweeper:
    """Sweeps in a daemon thread of its own, started by the first write. Thread-safe."""

    def __init__(self, root: Path, *, size_limit: int, stale_s: float) -> None:
        self._root = root
        self._size_limit = size_limit
        self._stale_s = stale_s
        self._lock = threading.Lock()
        self._unseen_bytes = size_limit  # written since the last sweep: the first write begins one
        self._due = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(FILES_COUNTERS, 0)
        self._failures = FailureLog(logger)

    def wrote(self, nbytes: int) -> None:
        """A file of ``nbytes`` was added."""
        with self._lock:
            self._unseen_bytes += nbytes
            if self._closed or self._unseen_bytes < self._size_limit * SWEEP_AFTER:
                return
            self._unseen_bytes = 0
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vcache-files-sweep", daemon=True)
                self._thread.start()
        self._due.set()

    def counters(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def close(self, timeout_s: float) -> None:
        with self._lock:
            self._closed = True
            thread = self._thread
        self._due.set()
        if thread is not None:
            thread.join(timeout_s)

    def sweep(self) -> None:
        """One look through the directory. Raises ``OSError``; does nothing while another process does it."""
        with self._alone() as now:
            if now is None:
                return
            objects: list[StoredFile] = []
            for path, status in self._files():
                if self._closed:
                    return
                if path.endswith(SUFFIX):
                    objects.append(StoredFile(status.st_mtime, status.st_size, path))
                elif path.endswith(TEMPORARY) and self._is_stale(path, now - status.st_mtime):
                    self._count(store_stale_removed=_removed(path))
            self._make_room(objects)
            self._count(store_sweeps=1)

    def _make_room(self, objects: list[StoredFile]) -> None:
        total = sum(found.nbytes for found in objects)
        if total <= self._size_limit:
            return
        for found in sorted(objects):
            if total <= self._size_limit * LOW_WATERMARK or self._closed:
                return
            total -= found.nbytes
            if _removed(found.path):
                self._count(store_evicted_objects=1, store_evicted_bytes=found.nbytes)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self._root) as fans:
            directories = [fan.path for fan in fans if fan.is_dir(follow_symlinks=False)]
        for directory in directories:
            with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # another process removed or renamed it
                        yield entry.path, entry.stat(follow_symlinks=False)

    def _is_stale(self, path: str, age_s: float) -> bool:
        if age_s < self._stale_s:
            return False
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # its writer lives
        except OSError:
            return age_s >= UNLOCKABLE_STALE_S
        else:
            return True
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[float | None]:
        """Under the directory's lock: the time now by the file system's own clock. ``None``: another sweeps."""
        lock = os.open(self._root / "sweep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError:
                logger.debug(
                    "%s has no file locks; two processes may sweep at once", self._root
                )  # they remove the same
            os.utime(lock)
            yield os.fstat(lock).st_mtime
        finally:
            os.close(lock)

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._closed:
                return
            try:
                self.sweep()
            except OSError as error:
                self._failures.record(f"sweep of {self._root}", error)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount


def _removed(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
