"""A segment's memory as tests see it: a table of records, and one cell per 4096 bytes that says whose bytes lie there."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 4096


def key(name: str | int) -> bytes:
    """A chunk key from a short name."""
    return str(name).encode().rjust(16, b".")


def keys(*names: str | int) -> list[bytes]:
    """Several chunk keys from short names."""
    return [key(name) for name in names]


@dataclass
class Record:
    """A directory record as memory holds it; generation 0 = free, odd = a writer at work."""

    generation: int = 0
    key: bytes = b""
    parent: bytes = b""
    rank: int = 0
    ranks: int = 1
    tenant: int = 0
    offset: int = 0
    nbytes: int = 0
    expires_s: int = 0


class SegmentMemory:
    """One segment's memory: it outlives its donor for those who have it mapped."""

    def __init__(self, name: str, *, records: int, units: int) -> None:
        self.id = key(name)
        self.records = [Record() for _ in range(records)]
        self.cells: list[bytes] = [b""] * units  # whose bytes; data begins at one unit
        self.nbytes = (units + 1) * UNIT

    def units_of(self, offset: int, nbytes: int) -> range:
        return range(offset // UNIT - 1, (offset + nbytes - 1) // UNIT)

    def retire(self, record: int, generation: int) -> None:
        """Retires the record if it still holds this generation, odd or even form."""
        if self.records[record].generation in (generation, generation - 1):
            self.records[record] = Record()
