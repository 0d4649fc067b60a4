"""Contestants in processes of their own, as users run one of them: none among the threads, or in the heap, of another."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

#: Calls a method of the contestant by its name, and answers what it does.
Ask = Callable[..., Any]


@contextmanager
def contestant(make: Callable[..., AbstractContextManager[object]], *arguments: object) -> Iterator[Ask]:
    """Enters ``make(*arguments)`` in a new process, and leaves it there in the end.

    Both are sent there, and what its methods are given and answer comes and goes, so plain values are best. What is raised there
    is a ``RuntimeError`` here, with its traceback.
    """
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, make, arguments))
    process.start()
    there.close()

    def answered() -> Any:
        try:
            said, is_answer = here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{make.__name__}: its process ended with status {process.exitcode}") from None
        if not is_answer:
            raise RuntimeError(f"{make.__name__}: {said}")
        return said

    def ask(method: str, *values: object) -> Any:
        here.send((method, values))
        return answered()

    try:
        answered()
        yield ask
    finally:
        here.close()  # that ends it
        process.join()


def end_when_told() -> None:
    """For a process of ours that Ctrl-C reaches as it does its parent: that one ends it, in order (SIGTERM)."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, end)


def _serve(
    pipe: Connection, make: Callable[..., AbstractContextManager[object]], arguments: tuple[object, ...]
) -> None:
    end_when_told()
    try:
        with make(*arguments) as acts:
            pipe.send((None, True))
            while True:
                method, values = pipe.recv()
                pipe.send((getattr(acts, method)(*values), True))
    except EOFError:
        pass  # the end
    except Exception:
        pipe.send((traceback.format_exc(), False))
