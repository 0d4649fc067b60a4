"""What an engine's counters say: what one request moved, and how far the store below the pool is. In the demo's children."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from vcache.demo.specs import Moved

TIERS: Final = ("vram", "dram", "store")
STORE_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> Moved:
    """The difference of two results of ``get_stats``. What goes to the store is a copy of what went to the pool: not counted."""

    def grown(tier: str, what: str) -> Any:
        return after[f"{tier}_{what}"] - before[f"{tier}_{what}"]

    return Moved(
        read_bytes={tier: grown(tier, "read_bytes") for tier in TIERS},
        read_s=sum(grown(tier, "read_seconds") for tier in TIERS),
        written_bytes=grown("vram", "written_bytes") + grown("dram", "written_bytes"),
        written_s=grown("vram", "written_seconds") + grown("dram", "written_seconds"),
    )


def await_store(stats: Callable[[], Mapping[str, Any]]) -> None:
    """Waits until the store below the pool, if there is one, can be written to: what is stored before never gets there.

    Raises ``TimeoutError``.
    """
    _await(lambda: stats().get("store_process_joins", True), "be joined")


def await_written(stats: Callable[[], Mapping[str, Any]]) -> None:
    """Waits until nothing is queued for the store any more. Raises ``TimeoutError``."""
    _await(lambda: not stats().get("store_queue_items"), "take what was stored")


def _await(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + STORE_TIMEOUT_S
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the store did not {what} within {STORE_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)  # polled: there are figures, not events
