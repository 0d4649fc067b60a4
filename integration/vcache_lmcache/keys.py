"""LMCache's keys and what its objects look like, as the pool names them.

A ``ChunkKey`` is 16 bytes of SHA-256 over the fields of LMCache's key, all of them, with their lengths, and the namespace.
The layout word of a record says of which form its payload is (dtypes, shapes, format), so that an object of another form
than the reader expects is a miss, however equal the key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from operator import attrgetter
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
#: What the keys of an in-process engine's chunks have in common; LMCache compares these, and the chunk's hash.
_chain_of_chunk: Final = attrgetter("model_name", "world_size", "worker_id", "dtype", "tags")
_chunk_hash: Final = attrgetter("chunk_hash")
#: A prompt's chunks are named when it is looked up, loaded and stored: hashing once is half the time of a lookup.
_MAX_REMEMBERED: Final = 1 << 16
_NOTHING: Final[Mapping[int, ChunkKey]] = {}


class KeyMaker:
    """The pool's keys for LMCache's. Thread-safe.

    What a batch's keys have in common is hashed once: its 32 bytes, and LMCache's hash of the chunk, make the key.
    """

    def __init__(self, namespace: str) -> None:
        self._object = _field(_OBJECT_DOMAIN) + _field(namespace)
        self._engine = _field(_ENGINE_DOMAIN) + _field(namespace)
        self._lock = threading.Lock()
        self._remembered: dict[tuple[object, ...], dict[int, ChunkKey]] = {}
        self._count = 0  # at least as many as are remembered

    def of_objects(self, keys: Sequence[ObjectKey]) -> list[ChunkKey]:
        """Keys of MP mode's objects."""
        made = []
        start, of_start = b"", None
        for key in keys:
            chain = _chain_of(key)
            if chain != of_start:
                start, of_start = sha256(self._object + _fields(chain)).digest(), chain
            made.append(sha256(start + key.chunk_hash).digest()[:KEY_BYTES])
        return cast("list[ChunkKey]", made)

    def of_chunks(self, keys: Sequence[CacheEngineKey]) -> list[ChunkKey]:
        """Keys of the in-process engine's chunks; what LMCache's own comparison looks at is in them."""
        chains = list(map(_chain_of_chunk, keys))
        if not chains:
            return []
        if chains.count(chains[0]) == len(chains):
            return self._of_chain(chains[0], list(map(_chunk_hash, keys)))
        return [self._of_chain(chain, [key.chunk_hash])[0] for chain, key in zip(chains, keys, strict=True)]

    def _of_chain(self, chain: tuple[object, ...], hashes: Sequence[int]) -> list[ChunkKey]:
        remembered = self._remembered.get(chain, _NOTHING)
        try:
            return [remembered[chunk_hash] for chunk_hash in hashes]
        except KeyError:
            pass
        *fields, tags = chain
        texts = [text for tag in cast("Sequence[tuple[object, ...]]", tags or ()) for text in tag]
        start = sha256(self._engine + _fields((*fields, len(texts), *texts))).digest()
        made = [cast("ChunkKey", sha256(start + b"%d" % each).digest()[:KEY_BYTES]) for each in hashes]
        with self._lock:
            self._count += len(made)
            if self._count > _MAX_REMEMBERED:
                self._remembered = {}  # a call that reads the old one goes on with it
                self._count = len(made)
            self._remembered.setdefault(chain, {}).update(zip(hashes, made, strict=True))
        return made


def _chain_of(key: ObjectKey) -> tuple[str, int, int, str]:
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
