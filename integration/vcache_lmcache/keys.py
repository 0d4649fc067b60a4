"""LMCache's keys and what its objects look like, as the pool names them.

A ``ChunkKey`` is 16 bytes of SHA-256 over the fields of LMCache's key, all of them, with their lengths, and the namespace.
The layout word of a record says of which form its payload is (dtypes, shapes, format), so that an object of another form
than the reader expects is a miss, however equal the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final, cast

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj

from vcache.keys import ChunkKey
from vcache.protocol import KEY_BYTES

_OBJECT_DOMAIN: Final = b"vcache/lmcache-object/1"
_ENGINE_DOMAIN: Final = b"vcache/lmcache-engine/1"
_FORM_DOMAIN: Final = b"vcache/lmcache-form/1"
_LAYOUT_BYTES: Final = 8


class KeyMaker:
    """The pool's keys for LMCache's. Thread-safe.

    What a batch's keys have in common is hashed once: its 32 bytes, and LMCache's hash of the chunk, make the key.
    """

    def __init__(self, namespace: str) -> None:
        self._object = _field(_OBJECT_DOMAIN) + _field(namespace)
        self._engine = _field(_ENGINE_DOMAIN) + _field(namespace)

    def of_objects(self, keys: Sequence[ObjectKey]) -> list[ChunkKey]:
        """Keys of MP mode's objects."""
        made = []
        start, of_start = b"", None
        for key in keys:
            chain = chain_of(key)
            if chain != of_start:
                start, of_start = sha256(self._object + _fields(chain)).digest(), chain
            made.append(sha256(start + key.chunk_hash).digest()[:KEY_BYTES])
        return cast("list[ChunkKey]", made)

    def of_chunks(self, keys: Sequence[CacheEngineKey]) -> list[ChunkKey]:
        """Keys of the in-process engine's chunks; what LMCache's own comparison looks at is in them."""
        made = []
        start, of_start = b"", None
        for key in keys:
            chain = (key.model_name, key.world_size, key.worker_id, key.dtype, key.tags)
            if chain != of_start:
                tags = [text for tag in key.tags or () for text in tag]
                fields = _fields((*chain[:-1], len(tags), *tags))
                start, of_start = sha256(self._engine + fields).digest(), chain
            made.append(sha256(start + b"%d" % key.chunk_hash).digest()[:KEY_BYTES])
        return cast("list[ChunkKey]", made)


def chain_of(key: ObjectKey) -> tuple[str, int, int, str]:
    """What the objects of one prompt on one rank have in common."""
    return key.model_name, key.kv_rank, key.object_group_id, key.cache_salt


def layout_word(shapes: Iterable[torch.Size], dtypes: Iterable[torch.dtype], fmt: MemoryFormat) -> int:
    """64 bits that name the form of an object; never 0, which says nothing."""
    text = [f"{dtype} {tuple(shape)}" for shape, dtype in zip(shapes, dtypes, strict=True)]
    digest = sha256(_field(_FORM_DOMAIN) + _fields((fmt.name, *text))).digest()
    return int.from_bytes(digest[:_LAYOUT_BYTES], "little") or 1


def layout_of(obj: MemoryObj) -> int:
    """The form of an object as its metadata says."""
    meta = obj.meta
    return layout_word(meta.shapes or [meta.shape], meta.dtypes or [meta.dtype], meta.fmt)


def flat_bytes(obj: MemoryObj) -> torch.Tensor:
    """An object's bytes as uint8 ``[get_size()]``, no copy, whatever their dtype. ``ValueError`` if it is not in memory."""
    raw = obj.raw_tensor
    if raw is None:
        raise ValueError(f"an object of the kind {type(obj).__name__} has no tensor to copy")
    flat: torch.Tensor = raw.reshape(-1).view(torch.uint8)[: obj.get_size()]
    return flat


def _fields(values: Iterable[object]) -> bytes:
    return b"".join(map(_field, values))


def _field(value: object) -> bytes:
    data = value if isinstance(value, bytes) else str(value).encode()
    return len(data).to_bytes(8, "little") + data
