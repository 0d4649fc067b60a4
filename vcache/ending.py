"""What tells a process of ours to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def ending_signals() -> tuple[signal.Signals, ...]:
    """A closed terminal among them, unless the process was told to outlive that (nohup)."""
    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if stays else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Lets all of them unwind the stack as Ctrl-C does, so that the clean-up runs. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
