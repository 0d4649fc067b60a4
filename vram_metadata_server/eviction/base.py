"""The contract between the server and an eviction policy.

The server says what happens (a run was used, a placement may now go), the policy says which placement of a segment goes
next. Leaves go before their prefixes: a prefix without its children is still useful, children without their prefix are
not. So the server offers a placement when it may go (``Placement.may_go``), and the policy chooses among the offered ones.
In VRAM a leaf is a chunk without children in VRAM: its children may have been demoted before it. A policy is asked for one
segment at a time; what becomes of the chunk, its other ranks' shards among it, is not its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vram_metadata_server.index import Entry, Placement
from vram_metadata_server.segments import Segment


class EvictionPolicy(Protocol):
    """Chooses victims. It may use ``Entry.touched`` as it likes; nobody else does.

    Every call but ``choose`` is on the path of a request and does no more than a constant amount of work per entry.
    """

    def touch(self, run: Sequence[Entry]) -> None:
        """These entries were used together, in this order (a run of a prompt: each but the first is its forerunner's child)."""

    def offer(self, placement: Placement) -> None:
        """The placement may go now; its entry is whole. May be said again of the same placement."""

    def choose(self, segment: Segment) -> Placement | None:
        """The placement of this segment that goes next, no longer offered; it may go, its entry is whole and has no holds.

        None when there is none, or none was found within a bounded amount of work (the caller tries again later). The
        caller evicts it, or has it demoted, at once.
        """

    def forget(self, segment: Segment) -> None:
        """The segment was dropped."""
