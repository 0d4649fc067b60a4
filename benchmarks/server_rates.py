"""The metadata server's rates over its ipc socket, beside a bare ZeroMQ echo of the same bytes in the same rounds.

The real server process runs alone on one core, the client and nothing else on another (where there are two). What is
measured is the server with the thinnest client there can be: encode, send, receive, decode. Not here: what `PoolClient` adds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import zmq

from benchmarks.measure import interleave
from vcache import protocol
from vcache.config import ServerConfig, VCacheConfig
from vcache.server_query import fetch_stats

CALLS: Final = 400  # in one round
RUN: Final = 512  # chunks of a prompt
SILENCE_S: Final = 3600.0
_CORES: Final = frozenset(os.sched_getaffinity(0))
FIRST_CORE: Final = min(_CORES)
UNIT: Final = 4096
_HOST: Final = b"one host of many"
_ECHO: Final = """
import sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
while True:
    socket.send_multipart(socket.recv_multipart())
"""


class Caller:
    """A session with the server, one call at a time, on a plain DEALER socket."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, name: str = "bench") -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.session = secrets.token_bytes(16)
        self.term = 0
        self._id = 0
        welcome = self.call(protocol.Hello, protocol.PROTOCOL_VERSION, _HOST, name, "cpu:0", True, [])
        self.term = welcome.term

    def tell(self, kind: Any, *fields: Any) -> int:
        self._id += 1
        self.socket.send(protocol.encode(kind(self._id, self.session, self.term, *fields)))
        return self._id

    def call(self, kind: Any, *fields: Any) -> Any:
        return self.reply(self.tell(kind, *fields))

    def reply(self, name: int) -> Any:
        """What the server answers to the request of this number."""
        while True:
            reply = protocol.decode_reply(self.socket.recv())
            if reply.id == name:
                if isinstance(reply, protocol.Error):
                    raise RuntimeError(reply.text)
                return reply

    def register(self, *, records: int, nbytes: int) -> int:
        """A segment of memory that does not exist."""
        fields: tuple[Any, ...] = (
            secrets.token_bytes(16),
            1,
            protocol.Tier.DRAM,
            "cpu:0",
            nbytes,
            UNIT,
            records,
            b"",
            "bench",
            [],
        )
        number: int = self.call(protocol.RegisterSegment, *fields).number
        self.call(protocol.Handover, number, [], True)
        return number

    def stats(self) -> protocol.ServerStats:
        stats: protocol.ServerStats = self.call(protocol.Stats)
        return stats

    def store(self, keys: list[bytes], parent: bytes = b"", nbytes: int = UNIT) -> None:
        """Makes entries: reserves and commits, at most a call's worth of keys."""
        grants = self.call(protocol.Reserve, b"".join(keys), parent, 0, 1, nbytes, 256, 0, 0, 0.0)
        self.tell(protocol.Commit, [placement[2] for placement in protocol.PLACEMENT.iter_unpack(grants.placements)])


@contextmanager
def _process(*command: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the first core, ended afterwards; this one keeps to the others meanwhile."""
    first = {FIRST_CORE}
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        preexec_fn=lambda: os.sched_setaffinity(0, first),  # noqa: PLW1509 - no threads here yet
    )
    os.sched_setaffinity(0, _CORES - first or _CORES)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        os.sched_setaffinity(0, _CORES)


@contextmanager
def server_and_echo() -> Iterator[tuple[zmq.Context[Any], VCacheConfig, str, int]]:
    """A context, the configuration of a running server, the endpoint of a running echo, and the server's pid."""
    directory = tempfile.mkdtemp(prefix="vcb-", dir="/dev/shm")
    # Clients that wait for their turn send no heartbeats.
    config = VCacheConfig(runtime_dir=directory, log_level="WARNING", server=ServerConfig(liveness_timeout=SILENCE_S))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")}
    environment |= config.environment()
    echo = f"ipc://{directory}/echo.sock"
    context = zmq.Context()
    try:
        with (
            _process("-m", "vram_metadata_server", environment=environment) as server,
            _process("-c", _ECHO, echo, environment=environment),
        ):
            fetch_stats(config, timeout_s=60)
            yield context, config, echo, server.pid
    finally:
        context.destroy(linger=0)
        shutil.rmtree(directory)


def lookup_against_echo(*, keys: int = 128, rounds: int = 15) -> dict[str, Any]:
    """Lookups of present keys, against an echo of the same bytes: medians in microseconds, and each round's ratio."""
    with server_and_echo() as (context, config, echo_endpoint, _):
        caller = Caller(context, config.endpoint)
        caller.register(records=4096, nbytes=(4096 + 1) * UNIT)
        names = [secrets.token_bytes(16) for _ in range(keys)]
        caller.store(names)
        blob = b"".join(names)
        echo: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        echo.connect(echo_endpoint)
        request = protocol.encode(protocol.Lookup(1, caller.session, caller.term, blob, 0.0))

        def lookup() -> None:
            if caller.call(protocol.Lookup, blob, 0.0).hits != keys:
                raise RuntimeError("a key is not there")

        def bounce() -> None:
            echo.send(request)
            echo.recv()

        timings: dict[str, list[float]] = {"lookup": [], "echo": []}
        for _ in range(rounds + 1):  # the first warms up
            for name, act in (("echo", bounce), ("lookup", lookup)):
                begin = time.perf_counter()
                for _ in range(CALLS):
                    act()
                timings[name].append((time.perf_counter() - begin) / CALLS * 1e6)
        lookups, echoes = timings["lookup"][1:], timings["echo"][1:]
    ratios = [a / b for a, b in zip(lookups, echoes, strict=True)]
    return {
        "keys": keys,
        "lookup_us": statistics.median(lookups),
        "echo_us": statistics.median(echoes),
        "ratio": statistics.median(ratios),
        "lookups_us": lookups,
        "echoes_us": echoes,
    }


@dataclass(frozen=True)
class Load:
    """So many clients, each with one call of so many keys on its way, at a server with so many entries."""

    entries: int
    keys: int = 128
    clients: int = 1

    @property
    def name(self) -> str:
        return f"{self.entries:,} entries"


def acquire_and_release(loads: Sequence[Load], *, rounds: int) -> dict[Load, list[float]]:
    """Microseconds from one acquired and released run of present keys to the next, round by round.

    All loads in the same rounds; a server for each number of entries, idle while another is asked. With one client this is a
    call's latency. The clients are sockets of this one thread: more of them keep the server busy, not this machine's cores.
    """
    with ExitStack() as servers:
        pools = {}
        most = max(load.clients for load in loads)
        for entries in {load.entries for load in loads}:
            context, config, _, _ = servers.enter_context(server_and_echo())
            callers = [Caller(context, config.endpoint, f"bench-{at}") for at in range(most)]
            pools[entries] = callers, _filled(callers[0], entries)
        acts = {str(load): _acquiring(load, *pools[load.entries]) for load in loads}
        figures = interleave(acts, rounds=rounds)
    return {load: figures[str(load)] for load in loads}


def _filled(caller: Caller, entries: int) -> list[bytes]:
    """Prompts of ``RUN`` chunks, ``entries`` in all, as blobs of keys."""
    caller.register(records=1 << 20, nbytes=((1 << 20) + 1) * UNIT)
    more = max(0, entries - (1 << 20) * 9 // 10)
    if more:
        caller.register(records=1 << 20, nbytes=((1 << 20) + 1) * UNIT)
    runs = []
    for _ in range(entries // RUN):
        names = [secrets.token_bytes(16) for _ in range(RUN)]
        caller.store(names)
        runs.append(b"".join(names))
    return runs


def _acquiring(load: Load, callers: Sequence[Caller], runs: Sequence[bytes]) -> Callable[[], float]:
    callers = callers[: load.clients]
    nbytes = load.keys * protocol.KEY_BYTES
    turns = count()

    def figure() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS // len(callers)):
            asked = [c.tell(protocol.Acquire, runs[next(turns) * 7919 % len(runs)][:nbytes], 0, 10.0) for c in callers]
            for caller, name in zip(callers, asked, strict=True):
                reply = caller.reply(name)
                if len(reply.placements) != load.keys * protocol.PLACEMENT.size:
                    raise RuntimeError("a key is not there")
                caller.tell(protocol.Release, reply.lease, [])
        return (time.perf_counter() - begin) / (CALLS // len(callers) * len(callers)) * 1e6

    return figure


def main() -> None:
    print({name: value for name, value in lookup_against_echo().items() if not isinstance(value, list)}, flush=True)
    for load, figures in acquire_and_release([Load(1024), Load(1 << 20)], rounds=15).items():
        print(load, f"{statistics.median(figures):.1f} us")


if __name__ == "__main__":
    main()
