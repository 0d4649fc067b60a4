"""A companion's side of the socket that ends it together with the process it belongs to."""

from __future__ import annotations

import fcntl
import os
import socket


def end_with(life: int) -> None:
    """Has the kernel end this process when the other end of ``life`` goes: SIGIO needs neither the GIL nor a thread."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    other = socket.socket(fileno=os.dup(life))
    other.setblocking(False)
    try:
        gone = other.recv(1) == b""
    except BlockingIOError:
        gone = False
    if gone:  # before we asked for the signal
        os._exit(0)
