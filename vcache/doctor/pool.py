"""The pool: whether its server answers, and what has been donated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vcache.doctor.finding import Finding, State
from vcache.errors import ProtocolError, UnavailableError
from vcache.units import approximate_size

if TYPE_CHECKING:
    from vcache.config import VCacheConfig


def examine(config: VCacheConfig, *, timeout_s: float) -> Iterator[Finding]:
    from vcache.server_query import fetch_stats

    try:
        stats = fetch_stats(config, timeout_s=timeout_s)
    except (UnavailableError, ProtocolError) as error:
        yield Finding("metadata server", State.PROBLEM, str(error), "without it every lookup is a miss")
        return
    yield Finding("metadata server", State.OK, f"answers at {config.endpoint}, up {stats.uptime_s:.0f} s")
    if not stats.segments:
        yield Finding(
            "segments", State.PROBLEM, "nobody has donated memory", "run `vcache donate`, or set donate in an engine"
        )
        return
    for (tier, state), count in sorted(Counter((segment.tier, segment.state) for segment in stats.segments).items()):
        nbytes = sum(
            segment.total_bytes for segment in stats.segments if (segment.tier, segment.state) == (tier, state)
        )
        yield Finding("segments", State.OK, f"{count} {state} in {tier}: {approximate_size(nbytes)}")
