"""What the server tells operators of its segments."""

from __future__ import annotations

from vcache.protocol import SegmentStats
from vram_metadata_server.segments import Segment


def segment_stats(segment: Segment) -> SegmentStats:
    """A segment's part of the answer to ``Stats``."""
    space = segment.space
    return SegmentStats(
        number=segment.number,
        segment_id=segment.info.segment_id.hex(),
        label=segment.info.label,
        device=segment.info.device,
        tier=segment.info.tier.name.lower(),
        state=segment.state.value,
        total_bytes=space.total_bytes if space is not None else segment.data_bytes,
        used_bytes=segment.used_bytes,
        free_bytes=space.free_bytes if space is not None else 0,
        largest_free_bytes=space.largest_free_bytes if space is not None else 0,
        retiring_bytes=segment.retiring_bytes,
        records=segment.record_count,
        records_used=segment.records_used,
    )
