"""The page in front of every stored object: which shard it is, how long, and a checksum of every byte that follows.

A store may be shared by deployments, outlive versions of this code and lose bits. Whatever is read back counts only when
its page names the shard that was asked for and its checksum matches; everything else is ``CorruptionError``, a miss.

The checksum is XXH3-128 by ``xxhash``: measured on one core at 2 MiB, 35 GB/s, against 3.5 of ``zlib.crc32`` and ``blake3``,
11 of ``isal``, 20 of ``crc32c``, 26 of memcpy; it lets go of the GIL. It finds accidents, not forgeries: who may write into
a store is trusted. Not here: torch, and where objects lie.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import xxhash

from vcache.errors import CorruptionError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vcache.store.base import Shard

#: One page, so that the payload behind it is as aligned as the page is.
PAGE_BYTES: Final = 4096
MAGIC: Final = b"VCSHARD\0"
VERSION: Final = 1
#: The only codec so far: payloads stand as they are.
CODEC_NONE: Final = 0

# magic, version, codec, key, layout, rank, ranks, payload bytes, payload checksum
_FIELDS: Final = struct.Struct("<8sII16sQIIQ16s")
_CHECKSUM: Final = struct.Struct("<Q")  # of the fields before it
_PADDING: Final = bytes(PAGE_BYTES - _FIELDS.size - _CHECKSUM.size)


def sealed(shard: Shard, payload: Buffer) -> bytes:
    """The ``PAGE_BYTES`` that go in front of ``payload`` when it is stored as ``shard``."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        CODEC_NONE,
        shard.key,
        shard.layout,
        shard.rank,
        shard.ranks,
        memoryview(payload).nbytes,
        _digest(payload),
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) + _PADDING


def verify(shard: Shard, page: Buffer, payload: Buffer) -> None:
    """Raises ``CorruptionError``, saying what is wrong, unless these are the page and payload stored as ``shard``."""
    view = memoryview(page)
    if view.nbytes != PAGE_BYTES:
        raise CorruptionError(f"the page has {view.nbytes} bytes instead of {PAGE_BYTES}")
    fields = bytes(view[: _FIELDS.size])
    if xxhash.xxh3_64_intdigest(fields) != _CHECKSUM.unpack_from(view, _FIELDS.size)[0]:
        raise CorruptionError("the page does not match its own checksum")
    magic, version, codec, key, layout, rank, ranks, nbytes, digest = _FIELDS.unpack(fields)
    expected = (
        ("magic", magic, MAGIC),
        ("version", version, VERSION),
        ("codec", codec, CODEC_NONE),
        ("key", key, shard.key),
        ("layout", layout, shard.layout),
        ("rank", rank, shard.rank),
        ("ranks", ranks, shard.ranks),
        ("size", nbytes, memoryview(payload).nbytes),
    )
    for name, found, wanted in expected:
        if found != wanted:
            raise CorruptionError(f"its {name} is {_shown(found)}, not {_shown(wanted)}")
    if digest != _digest(payload):
        raise CorruptionError("its bytes do not match their checksum")


def _digest(payload: Buffer) -> bytes:
    state = xxhash.xxh3_128()
    state.update(payload)  # this form lets go of the GIL in every version of xxhash
    return state.digest()


def _shown(value: bytes | int) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
