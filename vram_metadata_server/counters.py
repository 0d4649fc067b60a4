"""The server's counters: their names and what they count. They only grow within a term."""

from __future__ import annotations

from typing import Final

MEANING: Final = {
    "messages": "requests handled",
    "bad_messages": "requests that could not be read: malformed, truncated, oversized, unknown",
    "refused_messages": "requests understood but refused: stale term, unknown session or segment, not allowed",
    "failed_messages": "requests that raised in the server (logged with a traceback); the server went on",
    "dropped_replies": "messages that could not be sent: their recipient is gone or does not read",
    "lookups": "Lookup and Acquire calls",
    "lookup_keys": "keys asked for in them",
    "hit_keys": "keys of their leading runs",
    "leases": "leases granted",
    "leases_expired": "leases that ended by their deadline",
    "leases_refused": "leases not granted because the session held too many",
    "validation_failures": "placements dropped because a reader's validation failed",
    "reserved": "records and extents granted",
    "reserve_exists": "keys not granted because they were there or being written",
    "reserve_no_space": "keys not granted for want of a record or extent",
    "reserve_declined": "keys not granted because no segment could take them, or the session held too many",
    "committed": "reservations that became placements",
    "commits_refused": "commits of reservations whose deadline had passed, that a removal had called off, or whose segment is draining or dropped",
    "commits_unknown": "commits of reservations that are not there",
    "aborted": "reservations given up by their writer",
    "reservations_expired": "reservations whose key was freed by the deadline",
    "reservations_settled": "expired reservations for which evidence came",
    "evicted": "entries evicted for space from the pool",
    "copies_evicted": "placements evicted for space whose shard the pool has elsewhere",
    "demoted": "chunks demoted from VRAM to host memory",
    "spilled": "chunks written to the store by their donors before they were evicted",
    "pulled": "chunks copied into a segment of another host, by its donor, before they were evicted",
    "pulls_sent_on": "chunks to be pulled into a segment that then went: evicted another way",
    "demotion_failed": "chunks that a donor could not demote, write or pull: evicted all the same, unless in use",
    "demotion_timed_out": "chunks not demoted, written or pulled by the deadline: evicted all the same, unless in use",
    "expired": "entries that ended by their time to live",
    "incomplete_expired": "entries dropped because some rank's shard never came",
    "removed": "entries removed by Remove or Clear",
    "retired": "records retired in memory by their donors",
    "handed_over": "committed records taken from donors",
    "handover_retired": "records of handovers not taken: removed, expired or without a living writer",
    "segments_registered": "segments registered",
    "segments_dropped": "segments dropped: drained, donor gone, silent or corrupt",
    "segments_corrupt": "segments dropped because their records contradict each other or a writer",
    "sessions_silent": "sessions past the liveness deadline",
    "sessions_dead": "sessions proven dead by a donor",
}


class Counters(dict[str, int]):
    """All counters, from zero."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(MEANING, 0))
