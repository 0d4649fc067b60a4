"""The client's counters: their names and what they count. ``get_stats`` shows them under ``client_``."""

from __future__ import annotations

from typing import Final

#: The client's counters. They only ever grow.
COUNTERS: Final = {
    "calls": "calls sent to the server",
    "calls_skipped": "calls answered as by an empty cache, since the server was known to be unavailable",
    "calls_timed_out": "calls that the server did not answer in time",
    "calls_refused": "calls that the server refused",
    "index_lookups": "lookups answered from the server's index in shared memory, without a call",
    "server_lookups": "lookups that the server was asked",
    "index_acquires": "reads that found their chunks in the server's index in shared memory, without a call",
    "stale_replies": "replies that came too late, or from an earlier life of the server",
    "bad_replies": "replies that were no message of this protocol, or not the one asked for",
    "unsent_messages": "messages dropped because the server could not be reached or was too slow to take them",
    "sessions_opened": "hellos answered",
    "sessions_lost": "sessions that the server did not know any more, mostly since it was restarted",
    "failures": "failures in the background thread",
    "unmapped_hits": "hits in segments that this process cannot map: not served",
    "misfit_hits": "hits whose payload has another size or layout than the tensors asked for: not served",
    "unmapped_grants": "grants in segments that this process cannot map: given back",
    "unpinned_grants": "grants in host memory that is not pinned for this process's GPU (yet): given back",
    "refused_marks": "grants whose record was not free in memory: given back",
    "lost_sources": "copies whose source had changed, or did not deliver, by their end: given back",
    "lost_writes": "writes whose record was no longer the writer's at the commit",
    "invalid_reads": "chunks whose record had changed by the end of the copy: not served",
    "remote_hits": "chunks read from segments of other hosts, and valid",
    "remote_read_bytes": "their bytes",
    "remote_lost_hits": "hits on other hosts that were not delivered: not served",
    "remote_failures": "times a donor on another host did not deliver in time, or was not there: it is left alone for a while",
    "remote_no_staging": "times there was no staging memory for a read from another host",
}
