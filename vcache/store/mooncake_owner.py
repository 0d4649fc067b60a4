"""A process that gives memory to a Mooncake store and does nothing else, so that objects outlive serving processes.

    python -m vcache.store.mooncake_owner MASTER BYTES HOSTNAME METADATA PROTOCOL [DEVICES]

Prints one line once the memory is given. What ends a process of ours (``ending.py``) takes it back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from vcache.ending import ending_signals
from vcache.store.mooncake_process import joined
from vcache.store.mooncake_wire import Setup


def main(arguments: list[str]) -> None:
    master, nbytes, hostname, metadata, protocol, *devices = arguments
    setup = Setup(
        master=master,
        metadata=metadata,
        protocol=protocol,
        devices=",".join(devices),
        hostname=hostname,
        segment_bytes=int(nbytes),
        replicas=1,
        soft_pin_s=0.0,
        key_prefix="",
        staging_bytes=0,
    )
    ending = ending_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)  # `vcache mooncake start` blocks them
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    handle = joined(setup)  # until then a signal ends the process: there is nothing to take back
    told, tell = socket.socketpair()  # a signal may reach a thread of Mooncake's, where no mask of ours holds it back
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    for number in ending:
        signal.signal(number, lambda number, frame: None)
    print(f"ready: {nbytes} bytes given to {master}, at {handle.get_hostname()}", flush=True)
    told.recv(1)
    handle.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
