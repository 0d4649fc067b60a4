"""What the connector counts: the names, a place to add to them from any thread, and what vLLM is told of them per step.

``docs/vllm.md`` documents every name.
"""

from __future__ import annotations

import threading
from typing import Final

#: Counters of one side of the connector. They only ever grow.
CONNECTOR_COUNTERS: Final = {
    "lookups": "prompts looked up in the pool and the store",
    "lookup_seconds": "time vLLM's scheduler spent in lookups",
    "declined_requests": "requests whose KV depends on something that has no name in a key",
    "loaded_chunks": "chunks loaded into vLLM's blocks, one per rank",
    "failed_chunks": "chunks that were promised to vLLM and could not be loaded: computed instead",
    "loaded_bytes": "bytes of the chunks loaded",
    "load_seconds": "time spent in loading them",
    "stored_chunks": "chunks committed to the pool, one per rank",
    "stored_bytes": "bytes of the chunks stored",
    "late_chunks": "chunks not stored: the server had not answered when their blocks were given away, or no step came soon after it had",
    "errors": "errors that were kept from vLLM",
}


class ConnectorCounters:
    """The ``CONNECTOR_COUNTERS`` of one side. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = dict.fromkeys(CONNECTOR_COUNTERS, 0)
        self._taken: dict[str, float] = dict(self._values)

    def add(self, **amounts: float) -> None:
        """Adds to counters by name. An unknown name is a ``KeyError``: a counter nobody documented."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return dict(self._values)

    def take(self, *, errors: int) -> dict[str, float]:
        """What was added since the last call, without what is zero. ``errors``: how many there were in all."""
        with self._lock:
            self._values["errors"] = errors
            grown = {name: value - self._taken[name] for name, value in self._values.items()}
            self._taken = dict(self._values)
        return {name: amount for name, amount in grown.items() if amount}
