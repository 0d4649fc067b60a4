"""Memory through which kernels are told, and answer: pinned on the host, and as much on the device; used again once they are done.

A *room* belongs to one call at a time. A call takes it, enqueues what reads and writes it, records its event behind that, and
gives it back: it goes to somebody else when the event has happened.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

_FEWEST_WORDS: Final = 1024


class Event(Protocol):
    """A place in a stream: ``torch.cuda.Event``."""

    def record(self) -> None:
        """In the current stream of the current device."""

    def query(self) -> bool:
        """Whether everything enqueued before it is done."""

    def wait(self) -> None:
        """Makes the current stream wait for it; the caller does not."""

    def synchronize(self) -> None:
        """Waits for it."""


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
        self._free: list[Room] = []
        self._lock = Lock()

    def take(self, count: int) -> Room:
        """Room for ``count`` words that nothing enqueued still uses. To be called with the device current."""
        with self._lock:
            for index, room in enumerate(self._free):
                if len(room.words) >= count and room.done.query():
                    return self._free.pop(index)
        words = max(_FEWEST_WORDS, 1 << (count - 1).bit_length())
        pinned = torch.empty(words, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        on_device = torch.empty(words, dtype=torch.int64, device=self._device)
        return Room(pinned, pinned.numpy(), on_device, _event(self._device))

    def give_back(self, room: Room) -> None:
        """``done`` was recorded behind the last of what uses it."""
        with self._lock:
            self._free.append(room)


@cache
def rooms_of(device: torch.device) -> Rooms:
    """Those of this process on ``device``, which has an index."""
    return Rooms(device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current device: kernels are launched there, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _NoEvent:
    """On the host, where only Triton's interpreter runs kernels, a launch is done when it returns."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


def _event(device: torch.device) -> Event:
    if device.type != "cuda":
        return _NoEvent()
    event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
