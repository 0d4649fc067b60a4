"""The metadata server's bars: a lookup beside a bare echo, keys a second, work under pressure, memory of a million entries."""

from __future__ import annotations

import statistics

from benchmarks.measure import Bar, Better, Effort, Result, compare, spread
from benchmarks.server_memory import memory_of_entries
from benchmarks.server_peer import MASTER, presence
from benchmarks.server_rates import Load, acquire_and_release, lookup_against_echo

ROUNDS = 15
LOOKUP_BAR = Bar(1.4, Better.LOWER)
RATE_BAR = Bar(400_000, Better.HIGHER)
FLAT_BAR = Bar(1.3, Better.LOWER)
KEYS = (1, 16, 128, 512)
CLIENTS = (2, 4, 8)
MEMORY_BAR = Bar(600, Better.LOWER)


def run(effort: Effort) -> list[Result]:
    """Microseconds, keys a second, MB."""
    rounds = effort.rounds(ROUNDS)
    many = 1_000_000 if effort is Effort.FULL else (1 << 13)
    echo = lookup_against_echo(rounds=rounds)
    figures = {"bare ZeroMQ echo": echo["echoes_us"], "lookup": echo["lookups_us"]}
    results = compare(
        "server: lookup",
        "128 present keys, over the socket",
        figures,
        unit="us",
        against="bare ZeroMQ echo",
        bars={"lookup": LOOKUP_BAR},
    )
    asked = presence([(keys, 1) for keys in KEYS] + [(128, clients) for clients in CLIENTS], rounds=rounds)
    for (keys, clients), of_both in asked.items():
        case = f"{keys} keys a call, {_clients(clients)}"
        results += compare("server: presence", case, of_both, unit="us", against=MASTER)
    results += _acquires(effort, few=1024, many=many)
    entries = 1_000_000 if effort is Effort.FULL else 10_000
    for case, is_chained in (("prompts of 128 chunks", True), ("single chunks", False)):
        memory = memory_of_entries(entries=entries, is_chained=is_chained)["bytes"] / 1e6
        bar = MEMORY_BAR if effort is Effort.FULL else None
        results.append(
            Result("server: memory", f"{entries:,} entries, {case}", "state machine", memory, 0.0, "MB", bar=bar)
        )
    return results


def _acquires(effort: Effort, *, few: int, many: int) -> list[Result]:
    """Latency and rate of acquire and release by entries, keys a call, and clients."""
    shapes = [(keys, 1) for keys in KEYS] + [(128, clients) for clients in CLIENTS]
    loads = [Load(entries, keys, clients) for keys, clients in shapes for entries in (few, many)]
    measured = acquire_and_release(loads, rounds=effort.rounds(ROUNDS))
    results = []
    for keys, clients in shapes:
        small, large = Load(few, keys, clients), Load(many, keys, clients)
        figures = {load.name: measured[load] for load in (small, large)}
        results += compare(
            "server: acquire and release",
            f"{keys} keys a call, {_clients(clients)}",
            figures,
            unit="us",
            against=small.name,
            bars={large.name: FLAT_BAR} if clients == 1 else None,
        )
    for load in (Load(few), Load(many)):
        rates = [load.keys / microseconds * 1e6 for microseconds in measured[load]]
        case = "acquire and release, 128 keys a call, all hits, 1 client"
        results.append(
            Result("server: rate", case, load.name, statistics.median(rates), spread(rates), "keys/s", bar=RATE_BAR)
        )
    return results


def _clients(count: int) -> str:
    return f"{count} clients" if count > 1 else "1 client"
