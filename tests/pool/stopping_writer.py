"""A child process that stores chunks and stops itself, by real signals, after given steps of the real write path.

``python -m tests.pool.stopping_writer STEP:SIGNAL[,STEP:SIGNAL] KEY...`` prints "starting", then "stored N" if it gets that
far, then serves until its stdin ends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from tests.pool.payloads import NBYTES, payload, poke
from vcache.config import VCacheConfig
from vcache.keys import ChunkKey
from vcache.memory.host import HostWords
from vcache.pool.client import PoolClient
from vcache.pool.writing import PendingWrite, begin_write

#: In order: between any two of these a writer can die or be suspended.
STEPS = ("reserve", "mark_first", "mark", "copy_half", "copy_with", "commit_first", "commit_records", "tell")


def stop_after(owner: type, name: str, stop: Callable[[], None]) -> None:
    """Makes a method call ``stop`` once it has done its work for the first time."""
    real = getattr(owner, name)

    def wrapped(self, *arguments, **named):
        result = real(self, *arguments, **named)
        setattr(owner, name, real)
        stop()
        return result

    setattr(owner, name, wrapped)


def main(stops: dict[str, str], keys: list[ChunkKey]) -> None:
    def stop(step: str) -> None:
        os.kill(os.getpid(), signal.Signals[stops[step]])

    for step in stops:
        # A record's generation is the only word that is stored by itself.
        if step == "mark_first":
            stop_after(HostWords, "store", partial(stop, step))
        elif step == "commit_first":
            stop_after(PendingWrite, "copy_with", lambda: stop_after(HostWords, "store", partial(stop, "commit_first")))
        elif step != "copy_half":
            stop_after(PendingWrite, step, partial(stop, step))
    client = PoolClient(VCacheConfig(), device="cpu:0", writes=True, name="stopping writer")
    assert client.wait_available(60)
    print("starting", flush=True)
    write = begin_write(client, keys, parent=b"", rank=0, ranks=1, nbytes=NBYTES, tokens=256, tenant=0)

    def copy_in(segment, chunks, offsets):
        for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
            data = payload(keys[write.granted[chunk]])
            poke(segment, offset, data[: NBYTES // 2])
            if "copy_half" in stops and chunk == len(keys) // 2:
                stop("copy_half")
            poke(segment, offset + NBYTES // 2, data[NBYTES // 2 :])

    write.copy_with(copy_in)
    print("stored", write.complete(), flush=True)
    sys.stdin.read()
    client.close()


if __name__ == "__main__":
    main(
        dict(stop.split(":") for stop in sys.argv[1].split(",")),
        [ChunkKey(bytes.fromhex(text)) for text in sys.argv[2:]],
    )
