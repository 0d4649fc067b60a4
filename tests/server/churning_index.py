"""A process that publishes an index and exchanges two keys in one of its slots without a pause, until its stdin is closed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from vcache.pool.runtime_dir import RuntimeDir
from vcache.pool.shared_index import index_apply
from vram_metadata_server.published import PublishedIndex

EXCHANGES = 1000


def main(directory: str, term: str, first: str, second: str) -> None:
    index = PublishedIndex(RuntimeDir(Path(directory)), term=int(term), max_bytes=1 << 20, min_slots=16)
    keys = bytes.fromhex(first), bytes.fromhex(second)
    index.changes[keys[0]] = b""
    index.update(is_exact=True)
    ended = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    print(index.name, flush=True)
    # The table's own function, as one call for many exchanges: from Python there would be a long time between two.
    table = index._table
    assert table is not None
    several = (keys[0] + keys[1] + keys[1] + keys[0]) * EXCHANGES
    placements = (2 * keys[0] + 2 * keys[1] + 2 * keys[1] + 2 * keys[0]) * EXCHANGES
    are_present = bytes([0, 1, 0, 1]) * EXCHANGES
    count = len(are_present)
    while not ended.is_set():
        index_apply(table.address, table.slots, table.limit, table.counts, several, placements, are_present, count)
    index.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
