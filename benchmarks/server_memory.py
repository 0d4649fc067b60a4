"""What a million entries cost the metadata server in resident memory, asked of the real process."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from benchmarks.server_rates import UNIT, Caller, server_and_echo

_SEGMENT_RECORDS = 1 << 20
_PER_CALL = 512


def memory_of_entries(count: int) -> dict[str, Any]:
    """Growth of the server's resident memory by so many chunks of one rank, in runs of 512 with their parents."""
    with server_and_echo() as (context, config, _, pid):
        caller = Caller(context, config.endpoint)
        for _ in range(-(-count * 11 // (10 * _SEGMENT_RECORDS))):
            caller.register(records=_SEGMENT_RECORDS, nbytes=(_SEGMENT_RECORDS + 1) * UNIT)
        before = _resident_bytes(pid)
        for start in range(0, count, _PER_CALL):
            caller.store([secrets.token_bytes(16) for _ in range(min(_PER_CALL, count - start))])
        entries = caller.stats().entries
        if entries != count:
            raise RuntimeError(f"{entries} entries, not {count}")
        return {"entries": count, "mb": (_resident_bytes(pid) - before) / 1e6}


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no VmRSS")
