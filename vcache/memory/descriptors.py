"""Descriptors that other processes of this user can have: a socket in the runtime directory, a thread that answers it.

A descriptor means something only in its own process; the kernel makes another's of it when it is sent over a unix socket. Who
connects sends nothing: it is told apart by the user it runs as, and gets a duplicate. Whoever asks waits no longer than its
deadline, since the thread that answers may be held up (a model that compiles holds the interpreter for seconds).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
import weakref
from pathlib import Path
from typing import Final

from vcache.errors import UnavailableError
from vcache.pool.runtime_dir import RuntimeDir

#: What goes with a descriptor: at least one byte has to.
_GREETING: Final = b"V"
#: For a peer that takes nothing; its own deadline is shorter.
_SEND_TIMEOUT_S: Final = 5.0
_BREATH_S: Final = 0.1
_RETRY_S: Final = 0.01
_FD: Final = struct.Struct("i")
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: process, user, group


class DescriptorServer:
    """Owns ``fd``, and gives a duplicate to everybody of this user who connects, until ``close`` or the end of the process.

    A forked child owns nothing of it. Raises ``OSError`` when the socket cannot be made; then ``fd`` stays the caller's.
    """

    def __init__(self, runtime: RuntimeDir, segment_id: bytes, fd: int) -> None:
        self.path, self._listener = runtime.listen_for_segment(segment_id)
        self._fd = fd
        self._lock = threading.Lock()
        self._at_exit = weakref.finalize(self, _remove_if_mine, self.path, os.getpid())
        _servers.add(self)
        self._thread = threading.Thread(
            target=_serve, args=(self._listener, fd), name="vcache-descriptors", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Nobody gets it any more; who has it keeps it. Harmless when called twice."""
        with self._lock:
            if self._fd < 0:
                return
            self._at_exit()
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread's accept; closing alone would not
            self._thread.join()
            self._let_go()

    def _let_go(self) -> None:
        self._listener.close()
        os.close(self._fd)
        self._fd = -1


_servers: Final[weakref.WeakSet[DescriptorServer]] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child would keep the memory, and keep others waiting for an answer, when its parent has long been dead."""
    for server in list(_servers):
        if server._fd >= 0:
            server._let_go()


os.register_at_fork(after_in_child=_forget_in_child)


def receive_descriptor(path: Path, timeout_s: float) -> int:
    """A descriptor from the server at ``path``; the caller's to close.

    Raises ``TimeoutError`` when it does not answer in time, ``UnavailableError`` when it is gone or takes this user for another.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            while True:
                link.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    link.connect(str(path))
                    break
                except BlockingIOError:  # more are waiting than it has room for
                    if time.monotonic() > deadline:
                        raise TimeoutError from None
                    time.sleep(_RETRY_S)
            require_same_user(link)
            # Not socket.recv_fds, which ignores its flags: without this one every child process would inherit it.
            _, sent, _, _ = link.recvmsg(len(_GREETING), socket.CMSG_SPACE(_FD.size), socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise TimeoutError(f"{path}: no answer in {timeout_s:g} s") from None
    except OSError as error:
        raise UnavailableError(f"{path}: its process is gone ({error})") from error
    if not sent:
        raise UnavailableError(f"{path}: its process ended, or takes this one for another user's")
    return int(_FD.unpack(sent[0][2])[0])


def require_same_user(link: socket.socket) -> None:
    """Raises ``PermissionError`` when the process at the other end (as it connected, or listened) is another user's."""
    _, user, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"the peer is a process of user {user}, this one is of user {os.geteuid()}")


def _serve(listener: socket.socket, fd: int) -> None:
    while True:
        try:
            link, _ = listener.accept()
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.EBADF}:  # closed
                return
            time.sleep(_BREATH_S)  # no descriptor left for the connection, say; it waits
            continue
        with link, contextlib.suppress(OSError):  # it ended, or is not to have it
            link.settimeout(_SEND_TIMEOUT_S)
            require_same_user(link)
            socket.send_fds(link, [_GREETING], [fd])


def _remove_if_mine(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        path.unlink(missing_ok=True)
