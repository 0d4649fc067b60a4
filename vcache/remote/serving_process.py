"""The process that offers one segment to other hosts: it maps it, registers it with an engine, and is there.

    python -m vcache.remote.serving_process LIFE CONTROL     (descriptors; see companion/link.py)

It ends with its donor, so that readers find out at once. Torch-free.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from pathlib import Path

import numpy as np

from vcache.companion.life import end_with
from vcache.companion.link import Close, Failed, Link, Ready
from vcache.errors import VCacheError
from vcache.memory.base import is_host
from vcache.pool.runtime_dir import RuntimeDir
from vcache.remote.announcement import Announcement, announced
from vcache.remote.engines import open_engine
from vcache.remote.wire import DECODER, Serve


def main(arguments: list[str]) -> None:
    life, control_fd = map(int, arguments)
    end_with(life)
    control = Link(socket.socket(fileno=control_fd), DECODER)
    serve = control.receive()
    assert isinstance(serve, Serve)
    try:
        engine = open_engine(serve.engine)
        if is_host(serve.device):
            mapping = _mapped(serve, read_only=engine.maps_read_only())
            address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
        else:
            from vcache.memory.cuda import CudaMemory

            runtime = RuntimeDir(Path(serve.runtime_dir))
            memory = CudaMemory.open(runtime, serve.handle, serve.nbytes, device=serve.device)
            address = memory.address
        engine.register(address, serve.nbytes)
    except (VCacheError, ImportError, OSError, RuntimeError) as error:  # RuntimeError: the engine's
        control.send(Failed(str(error)))
        os._exit(1)
    control.send(Ready(announced(Announcement(serve.engine.kind, engine.peer, address))))
    assert isinstance(control.receive(), Close)
    os._exit(0)  # the engine's threads may be at work; its destructors would wait for them


def _mapped(serve: Serve, *, read_only: bool) -> mmap.mmap:
    """The segment; where the engine allows it, so that a peer that writes, against the rules, cannot."""
    fd = RuntimeDir(Path(serve.runtime_dir)).open_segment_file(serve.handle.decode("ascii"))
    try:
        return mmap.mmap(fd, serve.nbytes, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE)
    finally:
        os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
