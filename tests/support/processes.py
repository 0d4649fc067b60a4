"""Child processes of tests: started in groups of their own, followed line by line, and always ended; their "host"."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vcache.config import VCacheConfig
from vcache.errors import UnavailableError
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

REPOSITORY = Path(__file__).resolve().parents[2]
#: Generous: how long something that always happens may take on a busy machine. Never a measure of speed.
PATIENCE_S = 60.0


def child_environment(config: VCacheConfig | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with ``config`` as its only VCache settings (default: the ``VCACHE_*`` it has)."""
    environment = dict(os.environ)
    if config is not None:
        environment = {name: value for name, value in environment.items() if not name.startswith("VCACHE_")}
        environment |= config.environment()
    search = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(search), "PYTHONUNBUFFERED": "1"} | dict(extra or {})


class Child:
    """A running process. What it prints on stdout is read as lines; stderr goes to ``log``."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.printed: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def line(self, timeout_s: float = PATIENCE_S) -> str:
        """The next line on stdout. Fails the test when the process ends or stays silent instead."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"printed nothing for {timeout_s} s\n{self.report()}") from None
        if line is None:
            self._lines.put(None)
            raise AssertionError(f"ended with status {self.wait()}\n{self.report()}")
        return line

    def expect(self, text: str, timeout_s: float = PATIENCE_S) -> str:
        """The next line on stdout that contains ``text``; lines before it are skipped."""
        deadline = time.monotonic() + timeout_s
        while text not in (line := self.line(max(0.0, deadline - time.monotonic()))):
            pass
        return line

    def tell(self, line: str) -> None:
        """Writes a line to the process's stdin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, once it ended by itself."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s\n{self.report()}") from None

    def stop(self, timeout_s: float = PATIENCE_S) -> int:
        """Asks it to end (SIGTERM) and gives its exit status."""
        self.popen.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to the process and everything it started; they are gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()
        self._reader.join()
        for stream in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def suspend(self) -> None:
        """SIGSTOP; the process is stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def report(self) -> str:
        """What it printed and logged, for a failing test."""
        log = self.log.read_text(errors="replace")[-8000:]
        return f"--- {self.popen.args!r}\n--- stdout\n{chr(10).join(self.printed[-50:])}\n--- stderr\n{log}"

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.printed.append(line.rstrip("\n"))
            self._lines.put(self.printed[-1])
        self._lines.put(None)


class Processes:
    """All child processes of one test. ``close`` ends whatever still runs, suspended or not."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.children: list[Child] = []

    def start(
        self,
        command: Sequence[str],
        *,
        config: VCacheConfig | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Child:
        """Starts a command under ``config`` (default: the test's environment)."""
        log = self._logs / f"process-{len(self.children)}.log"
        child = Child(command, environment=child_environment(config, extra), log=log)
        self.children.append(child)
        return child

    def python(
        self, *arguments: str, config: VCacheConfig | None = None, extra: Mapping[str, str] | None = None
    ) -> Child:
        """Starts this Python with ``arguments``, such as ``"-m", "tests.support.something"``."""
        return self.start([sys.executable, *arguments], config=config, extra=extra)

    def server(self, config: VCacheConfig) -> Child:
        """Starts a metadata server and waits until it answers."""
        child = self.python("-m", "vram_metadata_server", config=config)
        wait_until_serving(config, child)
        return child

    def close(self) -> None:
        for child in reversed(self.children):
            child.kill()


def wait_until_serving(config: VCacheConfig, child: Child, timeout_s: float = PATIENCE_S) -> ServerStats:
    """The state of the server that ``child`` is, once it answers. Fails the test when it ends or stays silent."""
    deadline = time.monotonic() + timeout_s
    while child.running and time.monotonic() < deadline:
        with contextlib.suppress(UnavailableError):  # a short wait each, so that a server that ended is noticed
            return fetch_stats(config, timeout_s=0.5)
    state = "does not answer" if child.running else f"ended with status {child.wait()}"
    raise AssertionError(f"the server {state}\n{child.report()}")


def processes_using(directory: Path) -> list[int]:
    """Other processes that have a file below ``directory`` open or mapped."""
    users = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
            names = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            if (
                any(name.startswith(f"{directory}/") for name in names)
                or f"{directory}/" in (entry / "maps").read_text()
            ):
                users.append(int(entry.name))
    return users


@contextlib.contextmanager
def host_directory() -> Iterator[Path]:
    """A fresh, short runtime directory in shared memory: a "host". Fails when a process still uses it afterwards.

    A process that ends with another one (a companion of a killed donor) has a moment for that; what remains is killed.
    """
    directory = Path(tempfile.mkdtemp(prefix="vct-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        deadline = time.monotonic() + PATIENCE_S / 6
        while (users := processes_using(directory)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in users:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)
    assert not users, f"processes {users} still used {directory} after the test (they were killed)"
