"""Places in a GPU's stream: to be waited for by another stream, or by the host. On a CPU everything is done when it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Protocol

import torch


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


class _NoEvent:
    """On the host, where only Triton's interpreter runs kernels, a launch is done when it returns."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


#: Behind nothing.
NO_EVENT: Final[Event] = _NoEvent()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current device: kernels are launched there, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def new_event(device: torch.device, *, spins: bool = True) -> Event:
    """Not recorded yet. ``spins``: who waits for it hears of it at once, and takes a core meanwhile."""
    if device.type != "cuda":
        return NO_EVENT
    event: Event = torch.cuda.Event(blocking=not spins)  # type: ignore[no-untyped-call]
    return event


def recorded(device: torch.device) -> Event:
    """Behind what has been enqueued on the device's current stream until now."""
    event = new_event(device, spins=False)
    with on(device):
        event.record()
    return event


def settled(device: torch.device) -> AbstractContextManager[object]:
    """Leaves only once what was enqueued on the device's current stream has been done, also by raising."""
    return _settled(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _settled(device: torch.device) -> Iterator[None]:
    try:
        yield
    finally:
        torch.cuda.current_stream(device).synchronize()
