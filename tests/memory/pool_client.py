"""A client whose GPU is another than the donor's: ``python -m tests.memory.pool_client``, a command a line.

    store KEY     stored COUNT            lookup KEY    hits COUNT          remove KEY    removed COUNT
    read          magic True|False: whether the segment's first word can be read in its mapping

KEY in hexadecimal. What it stores has no payload: that would need a GPU.
"""

from __future__ import annotations

import sys

from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.memory.cuda_driver import device_uuid
from vcache.pool.client import PoolClient
from vcache.pool.mappings import Use
from vcache.pool.segment import MAGIC
from vcache.pool.writing import begin_write


def main() -> None:
    client = PoolClient(VCacheConfig(), device=device_uuid(1), writes=True, maps_ahead=False)
    assert client.wait_available(60)
    use: Use | None = None
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        key = bytes.fromhex(rest[0]) if rest else b""
        if what == "store":
            write = begin_write(client, [ChunkKey(key)], parent=b"", rank=0, ranks=1, nbytes=4096, tokens=256, tenant=0)
            write.copy_with(lambda segment, chunks, offsets: None)
            print("stored", write.complete())
            assert client.settle(60)
            info = client.session.info(1)
            use = client.use_segment(info) if info is not None else None
        elif what == "lookup":
            assert client.wait_available(60)
            print("hits", client.lookup(key).hits)
        elif what == "remove":
            print("removed", client.remove(key))
        elif what == "read":
            assert use is not None
            print("magic", use.segment.memory.words.load(0) == MAGIC)
        sys.stdout.flush()
    if use is not None:
        use.release()
    client.close()


if __name__ == "__main__":
    main()
