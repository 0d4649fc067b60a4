"""The metadata server's bars: a lookup beside a bare echo, keys a second, work under pressure, memory of a million entries."""

from __future__ import annotations

from benchmarks.measure import Bar, Better, Effort, Result, compare, spread
from benchmarks.server_memory import memory_of_entries
from benchmarks.server_rates import acquire_and_release, lookup_against_echo, reserve_under_pressure

ROUNDS = 15
LOOKUP_BAR = Bar(1.4, Better.LOWER)
RATE_BAR = Bar(400_000, Better.HIGHER)
MEMORY_BAR = Bar(600, Better.LOWER)


def run(effort: Effort) -> list[Result]:
    """Microseconds, keys a second, MB."""
    rounds = effort.rounds(ROUNDS)
    many = (1 << 18) if effort is Effort.FULL else (1 << 13)
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
    for entries in (1024, many):
        rates = acquire_and_release(entries=entries, rounds=rounds)
        results.append(
            Result(
                "server: rate",
                f"acquire + release, 128 keys a call, all hits, {entries:,} entries",
                "metadata server",
                rates["keys_per_s"],
                spread(rates["rates"]),
                "keys/s",
                bar=RATE_BAR,
            )
        )
    pressed = reserve_under_pressure(rounds=rounds)
    results.append(
        Result(
            "server: pressure",
            "reserve + commit + evict + retire, full pool, a key's share",
            "state machine",
            pressed["us_per_key"],
            0.0,
            "us",
        )
    )
    entries = 1_000_000 if effort is Effort.FULL else 10_000
    for case, is_chained in (("prompts of 128 chunks", True), ("single chunks", False)):
        memory = memory_of_entries(entries=entries, is_chained=is_chained)["bytes"] / 1e6
        bar = MEMORY_BAR if effort is Effort.FULL else None
        results.append(
            Result("server: memory", f"{entries:,} entries, {case}", "state machine", memory, 0.0, "MB", bar=bar)
        )
    return results
