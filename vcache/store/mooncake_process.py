"""The Mooncake process: the only one that calls Mooncake, so that whatever Mooncake does to its process, serving goes on.

Measured of 0.3.13: ``setup`` against a master that accepts connections but hangs holds the GIL for 12 s (90 s with none),
``close`` for up to 15 s; any call on a closed handle ends the process. No probe rules these out, because a master can hang
between probe and call. Here they are harmless.

    python -m vcache.store.mooncake_process LIFE CONTROL STAGING LANE...     (descriptors; see companion/link.py)

What it does with the objects is in ``mooncake_objects.py``. Torch-free.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec

from vcache.companion.life import end_with
from vcache.companion.link import Answer, Close, Failed, Link, LinkClosedError, Ready
from vcache.errors import UnavailableError, VCacheError
from vcache.store.mooncake_objects import Objects, StagingMap
from vcache.store.mooncake_wire import DECODER, Exist, Get, PutAll, Remove, Setup

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine
    from mooncake.store import MooncakeDistributedStore

#: Between looks for a master that is not there. Looking costs nothing; ``setup`` without a master would block for long.
MASTER_RETRY_S: Final = 0.2
#: Mooncake copies some things through this; our transfers go straight into staging memory.
LOCAL_BUFFER_BYTES: Final = 16 << 20
#: Instead of a metadata server.
P2P: Final = "P2PHANDSHAKE"


def main(arguments: list[str]) -> None:
    life, control_fd, staging_fd, *lane_fds = map(int, arguments)
    end_with(life)
    control = Link(socket.socket(fileno=control_fd), DECODER)
    setup = control.receive()
    assert isinstance(setup, Setup)
    staging = StagingMap(staging_fd, setup.staging_bytes)
    try:
        setup = msgspec.structs.replace(setup, hostname=_name(setup))
        engine = started(setup)
        handle = joined(setup, engine)
    except (VCacheError, ImportError) as error:
        control.send(Failed(str(error)))
        os._exit(1)
    code = handle.register_buffer(staging.address, setup.staging_bytes)
    if code:
        control.send(Failed(f"staging memory could not be registered with Mooncake (code {code})"))
        os._exit(1)
    objects = Objects(handle, engine, staging, setup)
    for fd in lane_fds:
        lane = Link(socket.socket(fileno=fd), DECODER)
        threading.Thread(target=serve, args=(lane, objects), daemon=True).start()
    control.send(Ready())
    assert isinstance(control.receive(), Close)
    handle.close()  # so that the master forgets this process's memory at once
    os._exit(0)  # calls may be under way; destructors of a closed handle are not to be trusted


def started(setup: Setup) -> TransferEngine:
    """The transfer engine of this process."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    code = engine.initialize(setup.hostname, setup.metadata, setup.protocol, setup.devices)
    if code:
        raise UnavailableError(f"Mooncake's transfer engine cannot start on {setup.hostname} (code {code})")
    return engine


def _name(setup: Setup) -> str:
    """What others are to call this process: its address, at a metadata server with a port that no other has."""
    if setup.metadata == P2P:
        return setup.hostname  # the engine adds its own
    is_ipv6 = ":" in setup.hostname
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as probe:
        probe.bind((setup.hostname, 0))
        port = probe.getsockname()[1]  # should somebody take it now, this process is started anew
    return f"[{setup.hostname}]:{port}" if is_ipv6 else f"{setup.hostname}:{port}"


def joined(setup: Setup, engine: TransferEngine | None = None) -> MooncakeDistributedStore:
    """A handle that is set up, however long that takes. ``engine``: that it is to use, rather than one of its own."""
    from mooncake.store import MooncakeDistributedStore

    host, _, port = setup.master.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            time.sleep(MASTER_RETRY_S)
            continue
        handle = MooncakeDistributedStore()
        code = handle.setup(
            setup.hostname,
            setup.metadata,
            setup.segment_bytes,
            LOCAL_BUFFER_BYTES,
            setup.protocol,
            setup.devices,
            setup.master,
            engine=engine.get_engine() if engine is not None else None,
        )
        if code == 0:
            return handle
        time.sleep(MASTER_RETRY_S)  # the handle was never opened: nothing may be called on it, so it is dropped


def serve(lane: Link, objects: Objects) -> None:
    """Answers what comes on a lane, until its other end goes."""
    while True:
        try:
            ask = lane.receive()
            if isinstance(ask, Exist):
                lane.send(objects.exist(ask))
            elif isinstance(ask, Remove):
                lane.send(objects.remove(ask))
            elif isinstance(ask, Get | PutAll):
                for answer in objects.get(ask) if isinstance(ask, Get) else objects.put(ask):
                    lane.send(answer)
            else:
                return
        except LinkClosedError:
            return
        except Exception as error:  # of one call; the next may do better
            lane.send(Answer([], f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(sys.argv[1:])
