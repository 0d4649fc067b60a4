"""A pool of real processes, and a monkey that kills, suspends and restarts them as its seed says."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.board import Board, Count
from tests.chaos.worker import THREADS
from tests.support.processes import PATIENCE_S, Child, Processes
from vcache.config import VCacheConfig
from vcache.errors import UnavailableError
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

#: Deadlines that pass within a run, and yet mean something on a busy machine.
SHORT = {
    "server": {
        "heartbeat_interval": 0.1,
        "liveness_timeout": 1.5,
        "reservation_timeout": 0.4,
        "incomplete_timeout": 1.0,
        "max_lease": 2.0,
        "eviction": {"high_watermark": 0.8, "low_watermark": 0.6},
    },
    "client": {"call_timeout": 0.5, "lease": 0.4, "connect_timeout": 1.0},
    "segment": {"records": 64},
}
#: What goes wrong in the background when processes die around one, and no more than these.
_EXPECTED = {"UnavailableError", "FileNotFoundError", "CorruptionError"}
_WORK = (Count.STORED, Count.VERIFIED)
_FAILED = re.compile(r"failed \((\w+): ")


class Pool:
    """A server, donors and workers, each of which the monkey may harm."""

    def __init__(self, config: VCacheConfig, processes: Processes, board: Path, *, donors: int, workers: int) -> None:
        self.config = config
        self._processes = processes
        self._board = board
        self._workers = workers
        self._started = 0
        self.board = Board(board, workers * THREADS)
        self.server = processes.server(config)
        self.donors = [self._donor(index) for index in range(donors)]
        for donor in self.donors:
            donor.expect("donating")
        self.workers = [self._worker(index) for index in range(workers)]
        for worker in self.workers:
            worker.expect("working")

    def _donor(self, index: int) -> Child:
        options = ("--device", "cpu:0", "--size", "2MiB", "--label", f"donor {index}")
        return self._processes.python("-m", "vcache.cli", "donate", *options, config=self.config)

    def _worker(self, index: int) -> Child:
        self._started += 1  # a new life does new things
        arguments = (str(self._board), str(index), str(self._workers), str(self._started))
        return self._processes.python("-m", "tests.chaos.worker", *arguments, config=self.config)

    def restart_server(self) -> None:
        """Does not wait for it."""
        self.server = self._processes.python("-m", "vram_metadata_server", config=self.config)

    def restart_donor(self, index: int) -> None:
        self.donors[index] = self._donor(index)

    def restart_worker(self, index: int) -> None:
        self.workers[index] = self._worker(index)

    @property
    def children(self) -> list[Child]:
        return [self.server, *self.donors, *self.workers]

    def segment_ids(self) -> list[str]:
        """Those of the donors that live, as far as they have begun to donate."""
        said = [line for donor in self.donors for line in donor.printed if line.startswith("donating")]
        return [line.rsplit(" ", 1)[1] for line in said]

    def stats(self) -> ServerStats | None:
        try:
            return fetch_stats(self.config, timeout_s=1.0)
        except UnavailableError:
            return None

    def check(self) -> None:
        """Raises ``AssertionError`` when a process found something wrong, or has ended by itself."""
        for child in self._processes.children:
            found = [line for line in child.printed if line.startswith("WRONG")]
            assert not found, "\n".join([*found, child.report()])
        for child in self.children:
            assert child.running, f"ended by itself with status {child.wait()}\n{child.report()}"

    def check_logs(self) -> None:
        """Raises ``AssertionError`` when a process has logged what should not happen, whatever dies around it."""
        for child in self._processes.children:
            text = child.log.read_text(errors="replace")
            odd = set(_FAILED.findall(text)) - _EXPECTED
            assert not odd, f"{odd}\n{child.report()}"
            assert "Traceback" not in text, child.report()

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for what always happens, and fails when it does not, or when something is wrong meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            self.check()
            assert time.monotonic() < deadline, f"never came: {what}\n{self.stats()}"
            time.sleep(0.05)


class Monkey:
    """Harms a pool, one thing after another. ``log`` says what it did."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self._pool = pool
        self._rng = random.Random(seed)
        self._begun = time.monotonic()
        self._suspended: list[tuple[float, Child]] = []
        self.log = [f"seed {seed}"]

    def harm(self, events: int) -> None:
        """Does so many things, then resumes what is still suspended."""
        acts = (
            *[self.kill_server] * 2,
            *[self.kill_donor] * 3,
            *[self.kill_worker] * 4,
            *[self.suspend] * 8,
            self.end_server,
            self.end_donor,
            self.kill_server_twice,
            self.kill_everything,
        )
        for _ in range(events):
            self._rng.choice(acts)()
            if self._rng.random() < 0.7:
                self._see_some_work()
            self._wait(self._rng.uniform(0.0, 0.5))
            self._pool.check()
        for _, child in self._suspended:
            self._resume(child)
        self._suspended.clear()

    # --- the harm -------------------------------------------------------------------------------------------------

    def kill_server(self) -> None:
        self._kill("server", self._pool.server)
        self._wait(self._rng.choice([0.0, 0.5]))
        self._pool.restart_server()

    def kill_server_twice(self) -> None:
        self.kill_server()
        self._wait(self._rng.uniform(0.2, 1.0))  # perhaps before it serves, perhaps in the middle of the rebuild
        self.kill_server()

    def kill_donor(self) -> None:
        at = self._rng.randrange(len(self._pool.donors))
        self._kill(f"donor {at}", self._pool.donors[at])
        self._pool.restart_donor(at)

    def kill_worker(self) -> None:
        at = self._rng.randrange(len(self._pool.workers))
        self._kill(f"worker {at}", self._pool.workers[at])
        self._pool.restart_worker(at)

    def kill_everything(self) -> None:
        """Server and a worker at once: reservations in flight, and their writer is dead."""
        at = self._rng.randrange(len(self._pool.workers))
        self._kill(f"worker {at}", self._pool.workers[at])
        self.kill_server()
        self._pool.restart_worker(at)

    def end_server(self) -> None:
        self._end("server", self._pool.server)
        self._pool.restart_server()

    def end_donor(self) -> None:
        at = self._rng.randrange(len(self._pool.donors))
        self._end(f"donor {at}", self._pool.donors[at])
        self._pool.restart_donor(at)

    def suspend(self) -> None:
        """A process stands still, for less or more than its deadlines."""
        names = [f"{kind} {at}" for kind in ("donor", "worker") for at in range(len(getattr(self._pool, f"{kind}s")))]
        name, child = self._rng.choice([*zip(["server", *names], self._pool.children, strict=True)])
        for_s = self._rng.choice([0.2, 0.6, 1.2, 2.0, 3.0])
        if any(other is child for _, other in self._suspended):
            return
        self._say(f"suspend {name}, process {child.pid}, for {for_s} s")
        child.suspend()
        self._suspended.append((time.monotonic() + for_s, child))

    # --- how ------------------------------------------------------------------------------------------------------

    def _kill(self, name: str, child: Child) -> None:
        self._say(f"kill {name}")
        self._forget(child)
        child.kill()

    def _end(self, name: str, child: Child) -> None:
        self._say(f"end {name}")
        self._forget(child)
        child.resume()
        child.popen.send_signal(signal.SIGTERM)
        status = child.wait()
        # One that was told to end before it had begun knows no better.
        assert status in (0, -signal.SIGTERM), f"{name} ended with status {status}\n{child.report()}"

    def _see_some_work(self) -> None:
        """Lets the others do something, so that there is something to harm; not for long, since they may be unable to."""
        before = [self._pool.board.total(count) for count in _WORK]
        for _ in range(50):
            self._wait(0.1)
            now = [self._pool.board.total(count) for count in _WORK]
            if all(later >= earlier + 5 for earlier, later in zip(before, now, strict=True)):
                return

    def _wait(self, for_s: float) -> None:
        """Meanwhile resumes what has been suspended for long enough."""
        until = time.monotonic() + for_s
        while True:
            now = time.monotonic()
            for due, child in list(self._suspended):
                if due <= now:
                    self._forget(child)
                    self._resume(child)
            if now >= until:
                return
            time.sleep(min([until - now, *[max(0.01, due - now) for due, _ in self._suspended]]))

    def _resume(self, child: Child) -> None:
        self._say(f"resume process {child.pid}")
        child.resume()

    def _forget(self, child: Child) -> None:
        self._suspended = [(due, other) for due, other in self._suspended if other is not child]

    def _say(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._begun:6.2f} s: {what}")
