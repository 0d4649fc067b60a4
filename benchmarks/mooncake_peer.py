"""Mooncake's store as it comes: a master, an owner of memory as a process of its own or this process, and a client.

The client is Mooncake's Python binding used directly: VCache's store tier with its guard is measured in ``benchmarks.store``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from vcache.demo.processes import Stage
from vcache.store.mooncake_command import master_command, mooncake_environment

HOST: Final = "127.0.0.1"
_PATIENCE_S: Final = 60.0
_SCRATCH_BYTES: Final = 64 << 20  # what a client asks for itself
#: Waits of 1 s, as ``vcache`` uses Mooncake, would end copies of 512 MiB on a slow machine.
_TIMEOUT_S: Final = 60


class MooncakeClient:
    """Objects of equal size between registered memory and the store. Every call raises ``RuntimeError`` when it failed."""

    def __init__(self, master: str, segment_bytes: int) -> None:
        os.environ.update(_environment())
        from mooncake.store import MooncakeDistributedStore

        self.master = master
        self._store: Any = MooncakeDistributedStore()
        _expect(self._store.setup(HOST, "P2PHANDSHAKE", segment_bytes, _SCRATCH_BYTES, "tcp", "", master), "setup")

    def register(self, memory: torch.Tensor) -> None:
        """Makes a tensor's memory known; to be done once, before it is used."""
        _expect(self._store.register_buffer(memory.data_ptr(), memory.nbytes), "register_buffer")

    def unregister(self, memory: torch.Tensor) -> None:
        _expect(self._store.unregister_buffer(memory.data_ptr()), "unregister_buffer")

    def put(self, keys: Sequence[str], memory: torch.Tensor, nbytes: int) -> None:
        """Consecutive pieces of ``nbytes`` of the memory."""
        pieces = [memory.data_ptr() + at * nbytes for at in range(len(keys))]
        for code in self._store.batch_put_from(list(keys), pieces, [nbytes] * len(keys)):
            _expect(code, "put")

    def get(self, keys: Sequence[str], memory: torch.Tensor, nbytes: int) -> None:
        """The other way."""
        pieces = [memory.data_ptr() + at * nbytes for at in range(len(keys))]
        for read in self._store.batch_get_into(list(keys), pieces, [nbytes] * len(keys)):
            _expect(read - nbytes, "get")

    def exist(self, keys: list[str]) -> list[int]:
        """1 for each that is there."""
        answers: list[int] = self._store.batch_is_exist(keys)
        return answers

    def clear(self) -> None:
        """Removes all objects, read leases or not."""
        self._store.remove_all(True)

    def close(self) -> None:
        self._store.close()


def _expect(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"Mooncake: {what} answered {code}")


@contextmanager
def mooncake(stage: Stage, *, nbytes: int, in_process: bool) -> Iterator[MooncakeClient]:
    """A client of a store of its own, whose memory belongs to this process or to another (then it is reached over tcp)."""
    where = "this process" if in_process else "a process"
    port, metrics_port = _free_port(), _free_port()
    address = f"{HOST}:{port}"
    environment = _environment()
    command = master_command(host=HOST, port=port, metrics_port=metrics_port)
    master = stage.run(f"mooncake master of {where}", command, environment=environment)
    owner = None
    try:
        stage.wait_until(lambda: _accepts(port), what="Mooncake's master", timeout_s=_PATIENCE_S)
        if not in_process:
            owner = stage.run(
                "mooncake owner",
                [
                    sys.executable,
                    "-m",
                    "vcache.store.mooncake_owner",
                    address,
                    str(nbytes),
                    HOST,
                    "P2PHANDSHAKE",
                    "tcp",
                ],
                environment=environment,
            )
            log = owner.log
            stage.wait_until(lambda: "ready:" in log.read_text(), what="Mooncake's owner", timeout_s=_PATIENCE_S)
        client = MooncakeClient(address, nbytes if in_process else 0)
        try:
            yield client
        finally:
            client.close()
    finally:
        for process in (owner, master):
            if process is not None:
                stage.finish(process)


def await_room(client: MooncakeClient, keys: Sequence[str], memory: torch.Tensor, nbytes: int) -> None:
    """Until a first put goes through: memory may be given a moment before it is known."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(RuntimeError):
            client.put(keys, memory, nbytes)
            client.clear()
            return
        if time.monotonic() > deadline:
            raise RuntimeError("Mooncake: no room")
        time.sleep(0.1)  # polled: Mooncake does not say when


def _environment() -> dict[str, str]:
    waits = ("MC_TRANSFER_TIMEOUT", "MC_TCP_STATUS_TIMEOUT_SEC", "MC_TCP_PROGRESS_TIMEOUT_SEC")
    return mooncake_environment(HOST, _TIMEOUT_S) | dict.fromkeys(waits, str(_TIMEOUT_S))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HOST, port), timeout=1).close()
        return True
    return False
