"""A companion that does nothing but end with its owner."""

from __future__ import annotations

import signal
import socket
import sys

from vcache.companion.life import end_with
from vcache.companion.link import Link, Ready
from vcache.remote.wire import DECODER

if __name__ == "__main__":
    life, control, *_ = map(int, sys.argv[1:])
    end_with(life)
    Link(socket.socket(fileno=control), DECODER).send(Ready())
    while True:
        signal.pause()
