"""The demo's processes and the directory they share; whatever happens, none of it is left behind.

Every child is in a process group of its own, so that Ctrl-C reaches the parent alone, which then stops them in order; the
kernel ends them too if the parent is killed outright.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from vcache.errors import UnavailableError, VCacheError
from vcache.pool.runtime_dir import lock_file

STOP_TIMEOUT_S: Final = 10.0
LOG_TAIL_LINES: Final = 30
SHARED_MEMORY: Final = Path("/dev/shm")
_PREFIX: Final = "vcache-demo-"
#: In a demo's directory, held (flock) for as long as the demo lives.
_LOCK: Final = "lock"
_PR_SET_PDEATHSIG: Final = 1
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_libc: Final = ctypes.CDLL(None)


class ChildFailed(VCacheError):  # noqa: N818 - an event that happened to a child, not an error of the caller
    """A process of the demo ended early or said nothing in time; carries the end of its log."""


def _begin_child(signal_mask: set[signal.Signals]) -> None:
    """Lets the child die with its parent, and be told to end."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)


class Child:
    """One process of the demo, with its log and the pipe on which it reports."""

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        read_fd, write_fd = os.pipe()
        self._pipe = os.fdopen(read_fd, "rb", buffering=0)
        self._pending = b""
        # Around a fork Python runs hooks in which it ignores exceptions: an interrupt that came then would be lost.
        mask = {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)}
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [*command, f"--report-fd={write_fd}"] if _reports(command) else list(command),
                    stdin=subprocess.PIPE if _reports(command) else subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    pass_fds=(write_fd,),
                    start_new_session=True,
                    preexec_fn=partial(_begin_child, mask),  # noqa: PLW1509 - calls nothing but prctl and the mask
                )
        finally:
            os.close(write_fd)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: msgspec.Struct, *, timeout_s: float, on_stage: Callable[[str], None]) -> dict[str, Any]:
        """Has a child that reports do something; its result. Raises ``ChildFailed``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: ``result`` says so, with what it printed
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        return self.result(timeout_s=timeout_s, on_stage=on_stage)

    def result(self, *, timeout_s: float, on_stage: Callable[[str], None]) -> dict[str, Any]:
        """Waits for the child's next result, passing on the stages it reports; raises ``ChildFailed``."""
        deadline = time.monotonic() + timeout_s
        while (line := self._line(deadline)) is not None:
            message = json.loads(line)
            if "result" in message:
                return dict(message["result"])
            on_stage(str(message["stage"]))
        if time.monotonic() >= deadline:
            raise ChildFailed(f"{self.name} gave no result within {timeout_s:g} s\n{self.log_tail()}")
        status = self._process.wait(STOP_TIMEOUT_S)
        raise ChildFailed(f"{self.name} ended with status {status} and no result\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines it printed."""
        return _tail(self.log)

    def finish(self) -> None:
        """Tells a child that reports that there are no more requests, and waits for it to end by itself; stops any other."""
        if self._process.stdin is not None:
            self._close_input()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        self.stop()

    def kill(self) -> None:
        """Ends it without a chance to say a word (SIGKILL)."""
        self._process.kill()
        self._process.wait()
        self.stop()

    def stop(self) -> None:
        """Asks it to end, and ends it when it does not; harmless on one that has ended."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._close_input()
        self._pipe.close()

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _line(self, deadline: float) -> bytes | None:
        """The next line from the pipe; ``None`` when it closes or the deadline passes first."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while b"\n" not in self._pending:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            data = self._pipe.read(65_536)
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def _reports(command: Sequence[str]) -> bool:
    return any(part.startswith("vcache.demo.") for part in command)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:]) or "  (it printed nothing)"


class Stage:
    """The demo's own runtime directory and every process in it; a context manager that leaves neither behind.

    What a demo that was killed left in shared memory the next one removes.
    """

    def __init__(self) -> None:
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        self._alive = lock_file(self.directory / _LOCK)
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, name: str, module: str, *arguments: str, environment: Mapping[str, str]) -> Child:
        """Starts ``python -m module arguments`` under exactly the ``VCACHE_*`` variables given."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("VCACHE_")}
        return self.run(name, [sys.executable, "-m", module, *arguments], environment={**inherited, **environment})

    def run(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> Child:
        """Starts a command under exactly this environment."""
        child = Child(name, command, environment=environment, log=self.directory / f"{name.replace(' ', '-')}.log")
        self._children.append(child)
        return child

    def logs(self) -> str:
        """The last lines that each process printed, those that have ended included."""
        return "\n".join(f"{path.stem}:\n{_tail(path)}" for path in sorted(self.directory.glob("*.log")))

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        """Waits for a state of the processes; raises ``ChildFailed`` when one of them ends meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            for child in self._children:
                if not child.running:
                    raise ChildFailed(f"{child.name} ended while waiting for {what}\n{child.log_tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{what}: not within {timeout_s:g} s\n{self.logs()}")
            time.sleep(0.05)  # polled: readiness lies in another process's state

    def finish(self, child: Child) -> None:
        """Lets a child whose work is done take its leave of the pool."""
        child.finish()
        self._children.remove(child)

    def kill(self, children: Sequence[Child]) -> None:
        """Ends children without a chance to say a word."""
        for child in children:
            child.kill()
            self._children.remove(child)

    def close(self) -> None:
        """Stops the children, last started first, and removes the directory; harmless when done before."""
        while self._children:
            self._children.pop().stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._alive is not None:
            self._alive.close()


def _remove_abandoned(parent: Path) -> None:
    """Removes directories whose lock nobody holds. One without a lock file may be about to get one, and stays."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or another demo was quicker
            free = lock_file(lock)
            if free is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
                free.close()
