"""When to evict: segments above their high watermark, or that refused a write, until they are below the low one.

Runs in the background (``Pressure.victims`` from the server's tick), a bounded number of victims at a time, ahead of the
writes: one that finds no space now is skipped, not made to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from vram_metadata_server.eviction.base import EvictionPolicy
from vram_metadata_server.index import Placement
from vram_metadata_server.segments import Segment, SegmentState

#: A refused write makes room for at least this fraction of the segment, and for so many writes of its kind.
_NUDGE_FRACTION: Final = 1 / 64
_NUDGE_WRITES: Final = 16


class Pressure:
    """The segments that are short of space."""

    def __init__(self, policy: EvictionPolicy, high_watermark: float, low_watermark: float) -> None:
        self._policy = policy
        self._high = high_watermark
        self._low = low_watermark
        self.targets: dict[
            Segment, tuple[int, int]
        ] = {}  # evict until used bytes and kept records are no more than these

    def check(self, segment: Segment) -> None:
        """To be called when a segment has got fuller."""
        if segment.is_fuller_than(self._high) and segment.space is not None and segment not in self.targets:
            self.targets[segment] = (
                int(self._low * segment.space.total_bytes),
                int(self._low * segment.record_count),
            )

    def nudge(self, segment: Segment, nbytes: int) -> None:
        """A write of ``nbytes`` found no record or no extent: make some room even below the high watermark."""
        if segment.space is None:
            return
        total = segment.space.total_bytes
        room = max(int(total * _NUDGE_FRACTION), nbytes * _NUDGE_WRITES)
        records = max(int(segment.record_count * _NUDGE_FRACTION), _NUDGE_WRITES)
        wanted = (
            max(0, min(int(self._low * total), segment.staying_bytes - room)),
            max(0, min(int(self._low * segment.record_count), segment.staying_records - records)),
        )
        if segment.retiring_bytes + segment.demoting_bytes >= room:
            return  # room is already being made
        known = self.targets.get(segment, wanted)
        self.targets[segment] = (min(known[0], wanted[0]), min(known[1], wanted[1]))

    def victims(self, most: int, waits: Callable[[Segment], bool]) -> Iterator[Placement]:
        """Up to ``most`` placements to evict or demote; the caller begins that with each before it asks for the next.

        A segment in which nothing may go now, or that ``waits``, is left alone until the next check or nudge.
        """
        for segment in list(self.targets):
            while segment.state is SegmentState.SERVING and not waits(segment):
                used_bytes, records = self.targets[segment]
                if segment.staying_bytes <= used_bytes and segment.staying_records <= records:
                    break
                if most <= 0:
                    return
                victim = self._policy.choose(segment)
                if victim is None:
                    break
                most -= 1
                yield victim
            self.targets.pop(segment, None)

    def forget(self, segment: Segment) -> None:
        self.targets.pop(segment, None)
        self._policy.forget(segment)
