"""Where things go and come from: the segments a write may use, best first, and the copy a reader is sent.

Only a donor's own host may write into a segment (a late one-sided write from elsewhere could not be called back), so a write
is placed on the writer's host or declined; reads prefer the reader's device, then its host, then any.
"""

from __future__ import annotations

from collections.abc import Iterable

from vram_metadata_server.index import Placement
from vram_metadata_server.members import Session
from vram_metadata_server.segments import Segment, SegmentState
from vram_metadata_server.settings import PlacementPolicy


def segments_for_write(
    segments: Iterable[Segment], writer: Session, nbytes: int, policy: PlacementPolicy
) -> list[Segment]:
    """The segments that can take a payload of ``nbytes``, the best last (the caller pops what turns out to be full)."""
    able = [
        segment
        for segment in segments
        if segment.state is SegmentState.SERVING and segment.info.host == writer.host and segment.data_bytes >= nbytes
    ]
    if policy == "local_first":
        able.sort(key=lambda segment: (segment.info.device == writer.device, _free_bytes(segment)))
    else:
        able.sort(key=_free_bytes)
    return able


def nearest(first: Placement, reader: Session) -> Placement:
    """The copy of a shard that is closest to the reader."""
    best, best_distance = first, 3
    copy: Placement | None = first
    while copy is not None:
        info = copy.segment.info
        distance = 2 if info.host != reader.host else int(info.device != reader.device)
        if distance < best_distance:
            best, best_distance = copy, distance
        copy = copy.next
    return best


def _free_bytes(segment: Segment) -> int:
    return segment.space.free_bytes if segment.space is not None else 0
