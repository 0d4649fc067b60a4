"""Where things go and come from: the segments a write may use, best first, and the copy a reader is sent.

Only a donor's own host may write into a segment (a late one-sided write from elsewhere could not be called back), so a write
is placed on the writer's host or declined. VRAM comes before host memory, and within a tier the own device before others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vcache.protocol import Reserve
from vram_metadata_server.index import Placement
from vram_metadata_server.members import Session
from vram_metadata_server.segments import Segment, SegmentState
from vram_metadata_server.settings import PlacementPolicy

_SERVING: Final = SegmentState.SERVING  # looked up by its class it takes ten times as long


def segments_for_write(
    segments: Iterable[Segment], writer: Session, request: Reserve, policy: PlacementPolicy
) -> list[Segment]:
    """Those of the writer's host's segments that can take the payloads, the best last (the caller pops what turns out full)."""
    nbytes = request.nbytes
    able = [segment for segment in segments if segment.state is _SERVING and segment.data_bytes >= nbytes]
    if is_for_copy(request):
        able = [segment for segment in able if is_target(segment, writer, request)]
    if len(able) < 2:
        return able
    if policy == "local_first":
        able.sort(key=lambda segment: (-segment.info.tier, segment.info.device == writer.device, _free_bytes(segment)))
    else:
        able.sort(key=lambda segment: (-segment.info.tier, _free_bytes(segment)))
    return able


def is_for_copy(request: Reserve) -> bool:
    """Whether the request says where its space is to be."""
    return bool(request.into) or request.into_tier is not None


def is_target(segment: Segment, writer: Session, request: Reserve) -> bool:
    """Whether a copy that the request asks for may lie in this segment."""
    info = segment.info
    return (
        info.host == writer.host
        and (not request.into or info.number == request.into)
        and (request.into_tier is None or info.tier is request.into_tier)
    )


def nearest(first: Placement, reader: Session) -> Placement:
    """The copy of a shard that is closest to the reader: by host, then tier, then device."""
    best, best_distance = first, 8
    copy: Placement | None = first
    while copy is not None:
        info = copy.segment.info
        distance = 4 * (info.host != reader.host) + 2 * info.tier + (info.device != reader.device)
        if distance < best_distance:
            best, best_distance = copy, distance
        copy = copy.next
    return best


def _free_bytes(segment: Segment) -> int:
    return segment.space.free_bytes if segment.space is not None else 0
