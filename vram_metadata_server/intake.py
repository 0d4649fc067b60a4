"""Messages that cannot be read: what can still be told of one, so that its sender gets an answer it can match."""

from __future__ import annotations

from typing import Final

from vcache.protocol import ONE_WAY

_UINT_BYTES: Final = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_ARRAY_HEADS: Final = {0xDC: 3, 0xDD: 5}
_ONE_WAY_TAGS: Final = frozenset(kind.__struct_config__.tag for kind in ONE_WAY)


def answer_id(message: bytes) -> int | None:
    """The id to answer an unreadable message with; 0 when not even that can be read, None when it wants no answer."""
    if not message:
        return 0
    head = message[0]
    at = 1 if 0x90 <= head <= 0x9F else _ARRAY_HEADS.get(head, 0)
    tag, at = _uint(message, at) if at else (None, 0)
    if tag is None:
        return 0
    if tag in _ONE_WAY_TAGS:
        return None
    name, _ = _uint(message, at)
    return name if name is not None and name < 1 << 63 else 0


def _uint(message: bytes, at: int) -> tuple[int | None, int]:
    """A msgpack unsigned integer and where the next thing begins."""
    if at >= len(message):
        return None, at
    head = message[at]
    if head < 0x80:
        return head, at + 1
    size = _UINT_BYTES.get(head, 0)
    digits = message[at + 1 : at + 1 + size]
    return (int.from_bytes(digits, "big"), at + 1 + size) if size and len(digits) == size else (None, at)
