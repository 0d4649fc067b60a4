"""Memory through which kernels are told, and answer: pinned on the host, and as much on the device; used again once they are done.

A *room* belongs to one call at a time. A call takes it, enqueues what reads and writes it, records its event behind that, and
gives it back: it goes to somebody else when the event has happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from vcache.transfer.events import Event, new_event

_FEWEST_WORDS: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Words for one call."""

    #: int64, on the host. Kernels may read and write it by its address: CUDA maps all pinned memory for all devices, at the
    #: address that it has on the host (unified addressing). What they wrote is there once an event behind them has happened.
    pinned: torch.Tensor
    #: The same memory.
    words: npt.NDArray[np.int64]
    #: int64, as many words on the device.
    on_device: torch.Tensor
    #: Behind the last of what uses the room.
    done: Event


class Rooms:
    """The rooms of one device. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: And what the last call that had it still used on the device.
        self._free: list[tuple[Room, object]] = []
        self._lock = Lock()

    def take(self, count: int) -> Room:
        """Room for ``count`` words that nothing enqueued still uses. To be called with the device current."""
        with self._lock:
            for index, (room, _) in enumerate(self._free):
                if len(room.words) >= count and room.done.query():
                    return self._free.pop(index)[0]
        words = max(_FEWEST_WORDS, 1 << (count - 1).bit_length())
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
            pinned = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
            on_device = torch.empty(words, dtype=torch.int64, device=self._device)
        return Room(pinned, pinned.numpy(), on_device, new_event(self._device))

    def give_back(self, room: Room, used: object = None) -> None:
        """``done`` was recorded behind the last of what uses it, and ``used``, which lives until then at least."""
        with self._lock:
            self._free.append((room, used))


@cache
def rooms_of(device: torch.device) -> Rooms:
    """Those of this process on ``device``, which has an index."""
    return Rooms(device)
