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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import zmq

from vcache import protocol
from vcache.config import VCacheConfig
from vcache.server_query import fetch_stats

CALLS: Final = 400  # in one round
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
        name = self.tell(kind, *fields)
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
    cores = os.sched_getaffinity(0)
    first = {min(cores)}
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        preexec_fn=lambda: os.sched_setaffinity(0, first),  # noqa: PLW1509 - no threads here yet
    )
    os.sched_setaffinity(0, cores - first or cores)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        os.sched_setaffinity(0, cores)


@contextmanager
def server_and_echo() -> Iterator[tuple[zmq.Context[Any], VCacheConfig, str, int]]:
    """A context, the configuration of a running server, the endpoint of a running echo, and the server's pid."""
    directory = tempfile.mkdtemp(prefix="vcb-", dir="/dev/shm")
    config = VCacheConfig(runtime_dir=directory, log_level="WARNING")
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


def acquire_and_release(*, keys: int = 128, entries: int = 1024, rounds: int = 15) -> dict[str, Any]:
    """Keys a second through acquire + release, all hits, one call at a time, in a pool of ``entries`` chunks."""
    with server_and_echo() as (context, config, _, pid):
        caller = Caller(context, config.endpoint)
        caller.register(records=1 << 20, nbytes=((1 << 20) + 1) * UNIT)
        runs = []
        for _ in range(entries // keys):
            names = [secrets.token_bytes(16) for _ in range(keys)]
            caller.store(names)
            runs.append(b"".join(names))
        rates, busy = [], []
        for _ in range(rounds + 1):
            cpu, begin = _cpu_s(pid), time.perf_counter()
            for at in range(CALLS):
                reply = caller.call(protocol.Acquire, runs[at * 7919 % len(runs)], 0, 10.0)
                caller.tell(protocol.Release, reply.lease, [])
            wall = time.perf_counter() - begin
            rates.append(keys * CALLS / wall)
            busy.append((_cpu_s(pid) - cpu) / CALLS * 1e6)
    return {
        "keys": keys,
        "entries": entries,
        "keys_per_s": statistics.median(rates[1:]),
        "server_cpu_us_per_call": statistics.median(busy[1:]),
        "rates": rates[1:],
    }


def reserve_under_pressure(*, keys: int = 128, records: int = 16_384, rounds: int = 15) -> dict[str, Any]:
    """The state machine's own time per reserved key while the pool is full and every write needs an eviction.

    Without sockets: reserve, commit, the tick with its evictions, and the donor's ``Retired`` are all counted.
    """
    from vram_metadata_server.service import Service
    from vram_metadata_server.settings import ServiceSettings

    service = Service(ServiceSettings(), term=1)
    state = {"id": 0, "now": 0.0}
    session = bytes(16)

    def say(kind: Any, *fields: Any) -> Any:
        state["id"] += 1
        message = protocol.encode(kind(state["id"], session, 0 if kind is protocol.Hello else 1, *fields))
        out = service.handle(b"r", message, state["now"])
        return protocol.decode_reply(protocol.encode(out[0][1])) if out else None

    def tick() -> None:
        while True:
            for _, orders in service.tick(state["now"], False):
                for number, items in orders.retire if isinstance(orders, protocol.Orders) else ():
                    say(protocol.Retired, number, items)
            if not service.has_work:
                break

    say(protocol.Hello, protocol.PROTOCOL_VERSION, _HOST, "bench", "cpu:0", True, [])
    number = say(
        protocol.RegisterSegment, bytes(16), 1, protocol.Tier.DRAM, "cpu:0", (records + 1) * UNIT, UNIT, records, b"", "", []
    ).number  # fmt: skip
    say(protocol.Handover, number, [], True)
    times, refused, asked = [], 0, 0
    for at in range(records // keys + rounds * 20):
        blob = secrets.token_bytes(16 * keys)
        begin = time.perf_counter()
        grants = say(protocol.Reserve, blob, b"", 0, 1, UNIT, 256, 0, 0, 0.0)
        say(protocol.Commit, [placement[2] for placement in protocol.PLACEMENT.iter_unpack(grants.placements)])
        tick()
        if at >= records // keys:
            times.append((time.perf_counter() - begin) / keys * 1e6)
            refused += grants.outcomes.count(protocol.Outcome.NO_SPACE)
            asked += keys
        state["now"] += 0.01
    return {"keys": keys, "us_per_key": statistics.median(times), "refused_fraction": refused / asked}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    for figures in (
        lookup_against_echo(),
        acquire_and_release(),
        acquire_and_release(entries=1 << 18),
        reserve_under_pressure(),
    ):
        print({name: value for name, value in figures.items() if not isinstance(value, list)}, flush=True)


if __name__ == "__main__":
    main()
