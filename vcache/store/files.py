"""A store in a directory, on a local disk or a mount that several hosts share: one file per shard.

    DIRECTORY/vcache-objects-1/5f/5f03...9e-0.kv                  a header page, then the payload
    DIRECTORY/vcache-objects-1/5f/5f03...9e-0.kv.4c1d....tmp      one being written

A file is written beside its final name and renamed, so a name that is there is whole, whoever dies when. Nothing is synced
to the disk: what a power failure leaves of a file fails its checksum. Two writers of a key replace equal bytes by equal bytes.
Making room is ``files_eviction.py``'s business.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vcache.errors import CorruptionError, UnavailableError
from vcache.store.base import Arrived, Got, Put, Shard
from vcache.store.files_eviction import OBJECTS, SUFFIX, TEMPORARY, Sweeper, lock_while_writing
from vcache.store.objects import PAGE_BYTES, sealed, verify

if TYPE_CHECKING:
    import torch

#: A file read is marked as used unless that was done this recently: a shared mount need not hear of every read.
TOUCH_INTERVAL_S: Final = 60.0
#: Its reader hears of so much at a time, read while it copies the last.
TELL_BYTES: Final = 4 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_OBJECT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
#: The directory as a whole, not one file, is out of reach: worth the guard's attention.
_UNREACHABLE: Final = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ENODEV, errno.EIO}
)


class FileStore:
    """Shards as files below ``directory``, which is made if its parent exists (a mount that is not there is not filled in)."""

    def __init__(self, directory: Path, *, size_limit: int, stale_s: float = 60.0) -> None:
        """``stale_s``: the age from which a half-written file nobody holds is removed. Does no I/O."""
        self._root = directory / OBJECTS
        self._closed = threading.Event()
        self._sweeper = Sweeper(self._root, size_limit=size_limit, stale_s=stale_s)

    def contains(self, shards: Sequence[Shard]) -> Sequence[bool]:
        self._check_open()
        return [self._is_there(shard) for shard in shards]

    def get_into(
        self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor], arrived: Arrived | None = None
    ) -> Sequence[Got]:
        self._check_open()
        now = time.time()
        results: list[Got] = []
        told = loaded_bytes = 0
        for index, (shard, buffer) in enumerate(zip(shards, buffers, strict=True)):
            # A chain's later chunks count as a little less recently used, so that leaves go before their prefixes.
            results.append(self._read(shard, buffer.numpy().data, now - index * 1e-6))
            loaded_bytes += buffer.nbytes if results[-1] is Got.LOADED else 0
            if arrived is not None and loaded_bytes >= TELL_BYTES:
                arrived([position for position in range(told, index + 1) if results[position] is Got.LOADED])
                told, loaded_bytes = index + 1, 0
        return results

    def put_from(self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Put]:
        self._check_open()
        now = time.time()
        return [
            self._write(shard, buffer.numpy().data, now - index * 1e-6)
            for index, (shard, buffer) in enumerate(zip(shards, buffers, strict=True))
        ]

    def remove(self, shards: Sequence[Shard]) -> int | None:
        self._check_open()
        found = [_removed(self._path(shard)) for shard in shards]
        return None if None in found else found.count(True)

    def counters(self) -> Mapping[str, int]:
        return self._sweeper.counters()

    def close(self, timeout_s: float = 10.0) -> None:
        self._closed.set()
        self._sweeper.close(timeout_s)

    def _is_there(self, shard: Shard) -> bool:
        try:
            found = os.stat(self._path(shard))
        except OSError as error:
            _raise_if_unreachable(error)
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size > PAGE_BYTES

    def _read(self, shard: Shard, payload: memoryview, used_at: float) -> Got:
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            _raise_if_unreachable(error)
            return Got.ABSENT if error.errno in {errno.ENOENT, errno.ENOTDIR} else Got.FAILED
        page = bytearray(PAGE_BYTES)
        try:
            status = os.fstat(file)
            if status.st_size != PAGE_BYTES + payload.nbytes:
                raise CorruptionError(f"the file has {status.st_size} bytes")
            _read_exactly(file, page, payload)
            verify(shard, page, payload)
            if status.st_mtime < used_at - TOUCH_INTERVAL_S:
                with contextlib.suppress(
                    OSError
                ):  # read-only, or somebody else's file: it is only less well remembered
                    os.utime(file, (used_at, used_at))
        except CorruptionError:
            _unlinked(path)
            return Got.INVALID
        except OSError as error:
            if error.errno == errno.ESTALE:  # another host removed it while we read
                return Got.ABSENT
            _raise_if_unreachable(error)
            return Got.FAILED
        finally:
            os.close(file)
        return Got.LOADED

    def _write(self, shard: Shard, payload: memoryview, used_at: float) -> Put:
        path = self._path(shard)
        temporary = f"{path}.{secrets.token_hex(8)}{TEMPORARY}"
        try:
            if self._is_there(shard):
                return Put.EXISTS
            file = self._create(temporary)
        except OSError as error:
            _raise_if_unreachable(error)
            return Put.FULL if error.errno in _FULL else Put.FAILED
        try:
            lock_while_writing(file)
            _write_all(file, sealed(shard, payload), payload)
            os.utime(file, (used_at, used_at))
            os.close(
                os.dup(file)
            )  # NFS may say only at a close that the disk is full; the lock stays until the last one
            os.rename(temporary, path)
        except OSError as error:
            _unlinked(temporary)
            _raise_if_unreachable(error)
            return Put.FULL if error.errno in _FULL else Put.FAILED
        finally:
            os.close(file)
        self._sweeper.wrote(PAGE_BYTES + payload.nbytes)
        return Put.STORED

    def _create(self, temporary: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            fan = os.path.dirname(temporary)
            for directory in (self._root.parent, self._root, fan):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
            return os.open(temporary, flags, 0o600)

    def _path(self, shard: Shard) -> str:
        name = shard.key.hex()
        return f"{self._root}/{name[:2]}/{name}-{shard.rank}{SUFFIX}"

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise UnavailableError(f"the store in {self._root.parent} is closed")


def _read_exactly(file: int, page: bytearray, payload: memoryview) -> None:
    buffers = [memoryview(page), payload.cast("B")]
    offset = 0
    while buffers:
        count = os.preadv(file, buffers, offset)
        if count == 0:
            raise CorruptionError("the file ends early")  # cut short since its size was looked at
        offset += count
        buffers = _beyond(buffers, count)


def _write_all(file: int, page: bytes, payload: memoryview) -> None:
    buffers = [memoryview(page), payload.cast("B")]
    while buffers:
        buffers = _beyond(buffers, os.writev(file, buffers))


def _beyond(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of ``buffers`` after their first ``count`` bytes."""
    while buffers and count >= buffers[0].nbytes:
        count -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if buffers else []


def _unlinked(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _removed(path: str) -> bool | None:
    """Whether an object was there that is gone now; ``None`` if it may be there still."""
    try:
        os.unlink(path)
    except OSError as error:
        _raise_if_unreachable(error)
        return False if error.errno in _NO_OBJECT or _is_absent(path) else None
    return True


def _is_absent(path: str) -> bool:
    """Whether there is surely nothing; a read-only disk refuses to unlink it before it has looked."""
    try:
        os.lstat(path)
    except OSError as error:
        _raise_if_unreachable(error)
        return error.errno in _NO_OBJECT
    return False


def _raise_if_unreachable(error: OSError) -> None:
    if error.errno in _UNREACHABLE:
        raise UnavailableError(f"the store's directory is out of reach: {error}") from error
