"""Mooncake's TransferEngine as a ``RemoteEngine``. Imported in companion processes only.

Measured of 0.3.13 over tcp (docs/remote.md has all of it): a read from a peer that hangs ends after 1 to 2 s by its time-outs, and
goes on writing into the buffer after it has said that it failed. To meet a peer that hangs takes 61 s: as the first read from
it, with every other read waiting for the engine's lock; by ``get_first_buffer_address``, with every other thread waiting
for the GIL; by ``send_probe``, with nobody else waiting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from mooncake.engine import TransferEngine

from vcache.errors import UnavailableError
from vcache.remote.base import EngineSetup, Piece

#: Between two looks at transfers under way. Mooncake's own waiting (``batch_transfer_sync_read``) keeps a core busy, which
#: made reads over loopback take 1.3 to 1.6 times as long on two cores.
PAUSE_S: Final = 0.0002
#: A read that takes longer is given up, should the transport's own time-outs not end it.
LONGEST_S: Final = 30.0
_DONE, _UNDER_WAY = 1, 0  # as ``transfer_check_status`` says; it knows of transfers of one piece only
_NO_METADATA_SERVER: Final = "P2PHANDSHAKE"


class MooncakeEngine:
    """One engine of this process."""

    def __init__(self, setup: EngineSetup) -> None:
        self._engine = TransferEngine()
        self._is_tcp = setup.protocol == "tcp"
        code = self._engine.initialize(setup.hostname, _NO_METADATA_SERVER, setup.protocol, setup.devices)
        if code:
            raise UnavailableError(f"Mooncake's transfer engine cannot start on {setup.hostname} (code {code})")
        self._hostname = setup.hostname

    @property
    def peer(self) -> str:
        return f"{self._hostname}:{self._engine.get_rpc_port()}"

    def maps_read_only(self) -> bool:
        return self._is_tcp  # a device registers memory for writing, too; a socket only finds that it cannot write

    def register(self, address: int, nbytes: int) -> None:
        code = self._engine.register_memory(address, nbytes)
        if code:
            raise UnavailableError(f"Mooncake's transfer engine cannot register {nbytes} bytes (code {code})")

    def greet(self, peer: str) -> int | None:
        if self._engine.send_probe(peer):
            return None
        return self._engine.get_first_buffer_address(peer) or None

    def read(self, peer: str, pieces: Sequence[Piece]) -> bool:
        under_way = []
        for remote, local, nbytes in pieces:
            transfer = self._engine.batch_transfer_async_read(peer, [local], [remote], [nbytes])
            if not transfer:
                return False
            under_way.append(transfer)
        deadline = time.monotonic() + LONGEST_S
        while under_way:
            states = [(transfer, self._engine.transfer_check_status(transfer)) for transfer in under_way]
            if any(state not in (_DONE, _UNDER_WAY) for _, state in states) or time.monotonic() > deadline:
                return False  # those of the others that are under way go on
            under_way = [transfer for transfer, state in states if state == _UNDER_WAY]
            time.sleep(PAUSE_S if under_way else 0)
        return True
