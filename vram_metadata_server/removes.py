"""``Remove`` and ``Clear``: gone from the index now, answered when gone from memory.

They end leases and outrank pins: a reader at work finds its record retired and has a miss. What was granted before, and is being
written or copied still, is called off. What donors hand over or writers claim later in this term is checked against them
(``RemovedInTerm``).
"""

from __future__ import annotations

from vcache.protocol import Done
from vram_metadata_server.catalog import Catalog
from vram_metadata_server.handover import Registrar
from vram_metadata_server.index import split_keys
from vram_metadata_server.removal import Removal
from vram_metadata_server.tombstones import Tombstones
from vram_metadata_server.writes import Writes


class Removes:
    """*remove* of the protocol's model (``tests/model``)."""

    def __init__(self, catalog: Catalog, tombstones: Tombstones, writes: Writes, registrar: Registrar) -> None:
        self._catalog = catalog
        self._tombstones = tombstones
        self._writes = writes
        self._registrar = registrar
        #: Answers that are due, for the service to send.
        self.answers: list[tuple[bytes, Done]] = []

    def remove(self, route: bytes, request: int, blob: bytes) -> None:
        """Removes chunks. Raises ``RefusalError`` on keys that are none."""
        keys = split_keys(blob)
        removal = Removal(route, request, self.answers)
        catalog = self._catalog
        for key in keys:
            entry = catalog.index.get(key)
            if entry is not None and self._tombstones.sweeps:  # first: what it buries is being retired from then on
                self._tombstones.bury(entry)
                entry = catalog.index.get(key)
            for item in catalog.retiring.get(key, ()):
                if item.segment.is_readable:
                    catalog.await_retired(item, removal)
            if entry is None:
                continue
            catalog.retire_entry(entry, removal)
            removal.count += 1
        catalog.counters["removed"] += removal.count
        self._registrar.removed.add(dict.fromkeys(keys, self._writes.next_generation))
        self._writes.call_off(catalog.reservations.of_keys(keys), removal)
        self._await_gates(removal)
        removal.settle()

    def clear(self, route: bytes, request: int, tenant: int | None) -> None:
        """Removes everything of a tenant; of all tenants when None."""
        removal = Removal(route, request, self.answers)
        below = self._writes.next_generation
        self._tombstones.clear(tenant, below, removal)
        self._registrar.removed.clear(tenant, below)
        self._writes.call_off(self._catalog.reservations.of_tenant(tenant), removal)
        self._await_gates(removal)
        removal.settle()

    def _await_gates(self, removal: Removal) -> None:
        """A handover under way, or a writer that has not said hello yet, may still bring what was removed."""
        for segment in self._registrar.gated.values():
            if segment.gate is not None and segment.is_readable:
                segment.gate.removals.append(removal)
                removal.wait()
