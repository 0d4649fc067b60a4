"""The runtime directory: what makes processes neighbours, and how a neighbour's death is proven.

Two processes are on the same host if and only if they see the same runtime directory. In it lie

* ``host``: 16 random bytes, the HostId;
* ``client-<session>.lock``: held (flock) by every writing client for as long as its process lives;
* ``segment-<id>.shm``: the memory of a host segment, held (flock) by its donor;
* ``segment-<id>.sock``: where the donor of a segment in VRAM hands out its memory, as long as it listens there;
* ``index-<term><random>.shm``: the metadata server's index for readers, held (flock) by the server;
* ``sweep.lock``: held for a moment while one of these is created or looked at, so that nobody takes a file that exists but
  is not yet locked for one whose owner has died;
* the metadata server's socket and lock, which are its own business.

The kernel drops a flock when its last holder is gone, however that came: a free lock proves death, and nothing else does.
Whoever may write here is trusted; deleting a lock file by hand says that its process is dead. No torch here: the metadata
server uses this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vcache.errors import ConfigError, CorruptionError, UnavailableError

HOST_ID_BYTES: Final = 16
#: How long ``sweep.lock`` is waited for: a process may be suspended while it holds it, and no wait is without a bound.
SWEEP_PATIENCE_S: Final = 1.0
_OWNED: Final = re.compile(
    r"(client)-([0-9a-f]{32})\.lock|segment-[0-9a-f]{32}\.(?:shm|sock)|index-[0-9a-f]{32}\.shm(?:\.new)?"
)
_SEGMENT_NAME: Final = re.compile(r"segment-[0-9a-f]{32}\.shm")
_SOCKET_NAME: Final = re.compile(r"segment-[0-9a-f]{32}\.sock")
_INDEX_NAME: Final = re.compile(r"index-[0-9a-f]{32}\.shm")

_held: weakref.WeakSet[HeldFile] = weakref.WeakSet()


class HeldFile:
    """An open file whose flock this process holds. Dropped by ``close``, or by the kernel when the process ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        _held.add(self)

    def unlink(self) -> None:
        """Removes the file's name; the lock and any mapping of the file stay."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        """Gives up the lock. Harmless when called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _forget_in_child() -> None:
    """A forked child shares its parent's locks: were it to keep them, they would outlive the parent's death."""
    for held in list(_held):
        held.close()


os.register_at_fork(after_in_child=_forget_in_child)


def lock_file(path: Path) -> HeldFile | None:
    """Opens (creating it, mode 0600) and locks a file; ``None`` when another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _take(fd):
        os.close(fd)
        return None
    return HeldFile(path, fd)


def _take(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RuntimeDir:
    """The runtime directory at ``path``, made (mode 0700) when absent.

    ``named_by``: the setting that says where it is, for errors. Raises ``ConfigError`` when it cannot be made or belongs to
    somebody else.
    """

    def __init__(self, path: Path, *, named_by: str = "") -> None:
        self.path = path
        self._named_by = named_by or f"runtime_dir = {str(path)!r}"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
        except OSError as error:
            raise ConfigError(
                f"{self._named_by}: cannot be made or read ({error}); set it to a directory in shared memory that this user "
                "may create, such as /dev/shm/vcache"
            ) from error
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise ConfigError(
                f"{self._named_by}: belongs to user {status.st_uid} with mode "
                f"{stat.S_IMODE(status.st_mode):04o}; it must belong to this user ({os.geteuid()}) and be writable by "
                "nobody else, since its files are mapped and trusted"
            )

    @property
    def host_id(self) -> bytes:
        """The HostId: 16 bytes that everybody with this directory agrees on. Raises ``ConfigError`` where it has none."""
        try:
            host_id = self._host_id()
        except OSError as error:
            raise ConfigError(f"{self._named_by}: its file `host` cannot be made or read ({error})") from error
        if len(host_id) != HOST_ID_BYTES:
            raise ConfigError(
                f"{self._named_by}: its file `host` holds {len(host_id)} bytes instead of {HOST_ID_BYTES}; remove the directory"
            )
        return host_id

    def _host_id(self) -> bytes:
        path = self.path / "host"
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        # Written whole beside its name and then linked: no reader ever sees half of it, and one creator wins.
        temporary = self.path / f"host-{secrets.token_hex(8)}"
        temporary.write_bytes(secrets.token_bytes(HOST_ID_BYTES))
        try:
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        return path.read_bytes()

    def hold_client_lock(self, session: bytes) -> HeldFile:
        """Creates and locks the file that proves this client alive. To be called before the client's first hello."""
        return self._create_locked(self._client_lock(session))

    def create_segment_file(self, segment_id: bytes) -> HeldFile:
        """Creates and locks the (empty) file of a host segment. ``close`` and ``unlink`` are the caller's."""
        return self._create_locked(self.path / segment_file_name(segment_id))

    def open_segment_file(self, name: str) -> int:
        """A descriptor for another process's segment file; ``name`` came over a socket and is checked.

        Raises ``CorruptionError`` for a name that is none, ``OSError`` when the file is not there.
        """
        if not _SEGMENT_NAME.fullmatch(name):
            raise CorruptionError(f"{name!r} does not name a segment file")
        return os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def listen_for_segment(self, segment_id: bytes) -> tuple[Path, socket.socket]:
        """A socket (mode 0600) at which a segment's memory is handed out, and its path. ``close`` and ``unlink`` are the caller's.

        Raises ``OSError`` when it cannot be made: the system allows its path 107 bytes.
        """
        path = self.path / f"segment-{segment_id.hex()}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._sweeping():  # bound, and not yet listening, it looks like a dead process's
                listener.bind(str(path))
                path.chmod(0o600)
                listener.listen()
        except BaseException:
            listener.close()
            raise
        return path, listener

    def segment_socket(self, name: str) -> Path:
        """Where another process listens for its segment; ``name`` came over a socket and is checked.

        Raises ``CorruptionError`` for a name that is none.
        """
        if not _SOCKET_NAME.fullmatch(name):
            raise CorruptionError(f"{name!r} does not name a segment's socket")
        return self.path / name

    def create_index_file(self, name: str) -> HeldFile:
        """Creates and locks the (empty) file of the server's index. ``close`` and ``unlink`` are the caller's."""
        return self._create_locked(self.path / name)

    def open_index_file(self, name: str) -> int:
        """A descriptor to read the server's index by; ``name`` came over a socket and is checked.

        Raises ``CorruptionError`` for a name that is none, ``OSError`` when the file is not there.
        """
        if not _INDEX_NAME.fullmatch(name):
            raise CorruptionError(f"{name!r} does not name an index")
        return os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def replace_file(self, old: HeldFile, new: HeldFile) -> None:
        """Gives the file ``new`` the name of ``old``, whose lock is given up. Raises ``UnavailableError`` as ``is_dead`` does."""
        with self._sweeping():  # a sweep that has just found the old one free would remove the name of the new one
            os.rename(new.path, old.path)
            new.path = old.path
            old.close()

    def is_dead(self, session: bytes) -> bool:
        """Whether the writing client ``session`` is proven dead: its lock file is gone, or its lock is free.

        Raises ``UnavailableError`` when ``sweep.lock`` cannot be had in time: then nothing is proven.
        """
        with self._sweeping():
            return _is_free(self._client_lock(session))

    def live_writers(self) -> list[bytes]:
        """The sessions of all writing clients of this host that are not proven dead.

        Raises ``UnavailableError`` as ``is_dead`` does.
        """
        with self._sweeping():
            return [
                bytes.fromhex(match[2])
                for match in self._owned()
                if match[1] and not _is_free(self.path / match.string)
            ]

    def sweep(self) -> list[str]:
        """Removes the lock files, segments and sockets whose owners are dead; returns the names removed.

        Memory that a living process still has mapped is freed when that process unmaps it. Raises ``UnavailableError``
        as ``is_dead`` does.
        """
        removed = []
        with self._sweeping():
            for match in self._owned():
                path = self.path / match.string
                if _is_free(path):
                    with contextlib.suppress(FileNotFoundError):
                        path.unlink()
                        removed.append(match.string)
        return removed

    def _client_lock(self, session: bytes) -> Path:
        return self.path / f"client-{session.hex()}.lock"

    def _owned(self) -> list[re.Match[str]]:
        return [match for name in sorted(os.listdir(self.path)) if (match := _OWNED.fullmatch(name))]

    def _create_locked(self, path: Path) -> HeldFile:
        with self._sweeping():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else can hold it: we made it, and hold sweep.lock
            return HeldFile(path, fd)

    @contextlib.contextmanager
    def _sweeping(self) -> Iterator[None]:
        fd = os.open(self.path / "sweep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + SWEEP_PATIENCE_S
            while not _take(fd):  # held for microseconds, unless its holder was suspended just there
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"{self.path}/sweep.lock has been held for {SWEEP_PATIENCE_S:g} s; a process that was suspended "
                        "while it held it must go on or end"
                    )
                time.sleep(0.001)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough when a fork has just copied the descriptor
        finally:
            os.close(fd)


def segment_file_name(segment_id: bytes) -> str:
    """The name of a host segment's file in the runtime directory."""
    return f"segment-{segment_id.hex()}.shm"


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock of ``path``, or listens there. Only to be asked while holding ``sweep.lock``."""
    if path.suffix == ".sock":
        return _is_deaf(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        free = _take(fd)
        if free:
            fcntl.flock(fd, fcntl.LOCK_UN)
        return free
    finally:
        os.close(fd)


def _is_deaf(path: Path) -> bool:
    """Whether no process has the socket ``path`` open. One that is stopped, or has no room for another connection, has."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False
    return False
