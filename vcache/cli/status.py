"""``vcache status``: what a running metadata server says of itself."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcache.cli.options import ConfigFile, Settings, duration, load_config
from vcache.errors import UnavailableError

if TYPE_CHECKING:
    from vcache.protocol import ServerStats

EXIT_UNAVAILABLE = 3


def status(
    config_file: ConfigFile = None,
    settings: Settings = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="The server to ask.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    interval: Annotated[
        str, typer.Option(metavar="DURATION", help="Rates are over this long; 0 asks once and shows none.")
    ] = "1s",
    timeout: Annotated[str, typer.Option(metavar="DURATION", help="How long to wait for an answer.")] = "3s",
) -> None:
    """Show a running server's term, segments, entries, leases, counters and rates. Exit status 3 if none answers."""
    from vcache.server_query import fetch_stats

    config = load_config(config_file, settings, server__endpoint=endpoint)
    interval_s, timeout_s = duration(interval, "--interval"), duration(timeout, "--timeout")
    try:
        second = first = fetch_stats(config, timeout_s=timeout_s)
        if interval_s:
            time.sleep(interval_s)
            second = fetch_stats(config, timeout_s=timeout_s)
    except UnavailableError as error:
        typer.echo(f"vcache: {error}", err=True)
        raise typer.Exit(EXIT_UNAVAILABLE) from error
    rates = rates_between(first, second)
    if as_json:
        typer.echo(json.dumps({"endpoint": config.endpoint, **_plain(second), "rates_per_s": rates}, indent=2))
    else:
        _print(config.endpoint, second, rates)


def rates_between(first: ServerStats, second: ServerStats) -> dict[str, float]:
    """Growth of each counter per second of the server's own clock; nothing across a restart or from one sample."""
    elapsed = second.uptime_s - first.uptime_s
    if first.term != second.term or elapsed <= 0:
        return {}
    return {name: (value - first.counters.get(name, 0)) / elapsed for name, value in second.counters.items()}


def _plain(stats: ServerStats) -> dict[str, Any]:
    import msgspec

    names = [field for field in stats.__struct_fields__ if field != "id"]
    return {name: msgspec.to_builtins(getattr(stats, name)) for name in names}


def _print(endpoint: str, stats: ServerStats, rates: dict[str, float]) -> None:
    from rich.table import Table
    from rich.text import Text

    from vcache.cli.options import table_console
    from vcache.units import approximate_size

    console = table_console()
    console.print(
        Text.assemble("metadata server at ", (endpoint, "bold"), f", term {stats.term}, up {stats.uptime_s:.0f} s")
    )
    console.print(
        f"{stats.entries} entries, {stats.leases} leases, {stats.reservations} reservations, {stats.pins} pins, "
        f"{stats.sessions} sessions, {len(stats.segments)} segments",
        highlight=False,
    )
    if stats.segments:
        table = Table(box=None, pad_edge=False)
        for title in (
            "segment",
            "device",
            "tier",
            "state",
            "size",
            "used",
            "free",
            "largest free",
            "retiring",
            "records",
        ):
            table.add_column(title, justify="left" if title in {"segment", "device", "tier", "state"} else "right")
        for segment in stats.segments:
            sizes = (segment.total_bytes, segment.used_bytes, segment.free_bytes, segment.largest_free_bytes)
            table.add_row(
                f"{segment.number} {segment.label}".strip(),
                segment.device,
                segment.tier,
                segment.state,
                *map(approximate_size, (*sizes, segment.retiring_bytes)),
                f"{segment.records_used}/{segment.records}",
            )
        console.print(table)
    if stats.counters:
        table = Table(box=None, pad_edge=False)
        table.add_column("counter")
        table.add_column("since start", justify="right")
        table.add_column("per second", justify="right")
        for name, value in sorted(stats.counters.items()):
            table.add_row(name, f"{value:,}", f"{rates[name]:,.1f}" if name in rates else "")
        console.print(table)
