"""Payloads whose every byte follows from their key, and the calls that move and check them."""

from __future__ import annotations

import ctypes
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence

from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.pool.reading import PendingRead, begin_read
from vcache.pool.segment import Segment
from vcache.pool.writing import PendingWrite, begin_write

NBYTES = 64 << 10
PATIENCE_S = 60.0


def new_keys(count: int) -> list[ChunkKey]:
    return [ChunkKey(secrets.token_bytes(16)) for _ in range(count)]


def payload(key: bytes, nbytes: int = NBYTES) -> bytes:
    return hashlib.shake_128(key).digest(nbytes)


def peek(segment: Segment, offset: int, nbytes: int) -> bytes:
    return ctypes.string_at(segment.memory.address + offset, nbytes)


def poke(segment: Segment, offset: int, data: bytes) -> None:
    ctypes.memmove(segment.memory.address + offset, data, len(data))


def start_write(
    client: PoolClient, keys: Sequence[ChunkKey], *, parent: bytes = b"", nbytes: int = NBYTES, **options
) -> PendingWrite:
    return begin_write(client, keys, parent=parent, rank=0, ranks=1, nbytes=nbytes, tokens=256, tenant=0, **options)


def fill(write: PendingWrite, keys: Sequence[ChunkKey]) -> None:
    """Copies what belongs to the granted keys."""

    def copy_in(segment, chunks, offsets):
        for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
            poke(segment, offset, payload(keys[write.granted[chunk]], write.nbytes))

    write.copy_with(copy_in)


def store(client: PoolClient, keys: Sequence[ChunkKey], **options) -> int:
    """Chunks stored. The server has been told when it returns, so that any other client finds them."""
    write = start_write(client, keys, **options)
    fill(write, keys)
    stored = write.complete()
    client.lookup(b"".join(keys))  # a round trip behind the commit
    return stored


def copy_out(read: PendingRead) -> dict[int, bytes]:
    """What was copied of each chunk of the run."""
    copied: dict[int, bytes] = {}

    def take(source, chunks, offsets):
        memory = source.tensor.numpy()
        for chunk, offset in zip(chunks.tolist(), offsets.tolist(), strict=True):
            copied[chunk] = memory[offset : offset + int(read.placements["nbytes"][chunk])].tobytes()

    read.copy_with(take)
    return copied


def load(client: PoolClient, keys: Sequence[ChunkKey]) -> int:
    """Leading chunks read and valid; fails the test for a single wrong byte in any of them."""
    read = begin_read(client, keys, 0)
    copied = copy_out(read)
    valid = read.complete()
    for chunk in range(valid):
        assert copied[chunk] == payload(keys[chunk], len(copied[chunk])), f"WRONG BYTES served for chunk {chunk}"
    return valid


def until_serving(client: PoolClient) -> None:
    """Waits until every segment grants space: after a restart that comes later than its registration."""
    until(lambda: (stats := client.stats()) and {it.state for it in stats.segments} == {"serving"}, "open gates")


def until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Waits for what always happens, and fails the test when it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)
