"""What a million entries cost the metadata server in memory: the growth of the process's resident set.

The state machine alone, in a process of its own, filled through its messages. Two shapes: prompts of 128 chunks (few leaves), and
single chunks (every entry is a leaf, which the eviction policy has to know of).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

UNIT: Final = 4096
KEYS: Final = 128
_HOST: Final = b"one host of many"


def memory_of_entries(*, entries: int = 1_000_000, is_chained: bool = True) -> dict[str, Any]:
    """Bytes per entry and in all, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.server_memory", str(entries), "chained" if is_chained else "single"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def resident_bytes() -> int:
    """Of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def _fill(entries: int, *, is_chained: bool) -> dict[str, Any]:
    import gc

    from vcache import protocol
    from vram_metadata_server.service import Service
    from vram_metadata_server.settings import ServiceSettings

    gc.disable()  # as the server does
    service = Service(ServiceSettings(), term=1_795_000_000_000)  # a term as large as real ones
    session, term = bytes(16), 0
    number = 0

    def say(kind: Any, *fields: Any) -> Any:
        nonlocal number
        number += 1
        out = service.handle(b"r", protocol.encode(kind(number, session, term, *fields)), 0.0)
        return out[0][1] if out else None

    term = say(protocol.Hello, protocol.PROTOCOL_VERSION, _HOST, "bench", "cpu:0", True, []).term
    before = resident_bytes()
    per_segment = 1 << 20
    for _ in range(-(-entries // (per_segment * 9 // 10))):
        segment = say(
            protocol.RegisterSegment,
            secrets.token_bytes(16),
            1,
            protocol.Tier.DRAM,
            "cpu:0",
            (per_segment + 1) * UNIT,
            UNIT,
            per_segment,
            b"",
            "",
            [],
        )
        say(protocol.Handover, segment.number, [], True)
    while len(service.catalog.index) < entries:
        runs = [[secrets.token_bytes(16) for _ in range(KEYS)]]
        if not is_chained:
            runs = [[key] for key in runs[0]]
        for run in runs:
            grants = say(protocol.Reserve, b"".join(run), b"", 0, 1, UNIT, 256, 0, 0, 0.0)
            say(protocol.Commit, [placement[2] for placement in protocol.PLACEMENT.iter_unpack(grants.placements)])
    grown = resident_bytes() - before
    held = len(service.catalog.index)
    return {"entries": held, "is_chained": is_chained, "bytes": grown, "bytes_per_entry": grown / held}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_fill(int(sys.argv[1]), is_chained=sys.argv[2] == "chained")))
    else:
        for shape in (True, False):
            print(memory_of_entries(is_chained=shape))
