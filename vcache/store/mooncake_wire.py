"""What a serving process asks of its Mooncake process; how is said in ``companion/link.py``. Torch-free."""

from __future__ import annotations

from typing import Final

import msgspec

from vcache.companion.link import Common


class Setup(msgspec.Struct, array_like=True, tag=True):
    """How to join the Mooncake store."""

    master: str
    metadata: str
    protocol: str
    devices: str
    hostname: str
    segment_bytes: int
    replicas: int
    soft_pin_s: float
    key_prefix: str
    staging_bytes: int


class Exist(msgspec.Struct, array_like=True, tag=True):
    """Asks which objects there are: 1 or 0 for each."""

    names: list[str]


class Remove(msgspec.Struct, array_like=True, tag=True):
    """Removes objects: 1 (it was there), 0 (it was not) or ``MAY_BE_THERE`` for each."""

    names: list[str]


MAY_BE_THERE: Final = -1


class Object(msgspec.Struct, array_like=True):
    """A shard, and where in staging memory its page begins."""

    key: bytes
    rank: int
    ranks: int
    layout: int
    offset: int
    nbytes: int  # of the payload


class Get(msgspec.Struct, array_like=True, tag=True):
    """Reads objects: a ``Got`` for each, within ``timeout_s``. What is not done by then is ``PENDING``."""

    objects: list[Object]
    timeout_s: float


class PutAll(msgspec.Struct, array_like=True, tag=True):
    """Writes objects: a ``Put`` for each, within ``timeout_s``. What is not done by then is ``PENDING``."""

    objects: list[Object]
    timeout_s: float


Ask = Exist | Remove | Get | PutAll

DECODER: Final[msgspec.msgpack.Decoder[Common | Setup | Ask]] = msgspec.msgpack.Decoder(Common | Setup | Ask)
