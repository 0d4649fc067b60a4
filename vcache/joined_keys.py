"""Many chunk keys as one: what makes a key of each of them does not count where they are only handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, overload

from vcache.protocol import KEY_BYTES

if TYPE_CHECKING:
    from vcache.keys import ChunkKey


class JoinedKeys(Sequence["ChunkKey"]):
    """Keys side by side in ``joined``, as messages carry them; each is made when it is asked for. Immutable."""

    __slots__ = ("joined",)

    def __init__(self, joined: bytes = b"") -> None:
        """Raises ``ValueError`` unless ``joined`` is a whole number of keys."""
        if len(joined) % KEY_BYTES:
            raise ValueError(f"joined: {len(joined)} bytes are not a whole number of keys of {KEY_BYTES} bytes each")
        self.joined = joined

    def __len__(self) -> int:
        return len(self.joined) // KEY_BYTES

    @overload
    def __getitem__(self, index: int) -> ChunkKey: ...
    @overload
    def __getitem__(self, index: slice) -> JoinedKeys: ...
    def __getitem__(self, index: int | slice) -> ChunkKey | JoinedKeys:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                return JoinedKeys(b"".join([self[at] for at in range(first, last, step)]))
            return JoinedKeys(self.joined[first * KEY_BYTES : last * KEY_BYTES])
        at = range(len(self))[index] * KEY_BYTES
        return cast("ChunkKey", self.joined[at : at + KEY_BYTES])


def join_keys(keys: Sequence[ChunkKey]) -> bytes:
    """All of them side by side."""
    return keys.joined if isinstance(keys, JoinedKeys) else b"".join(keys)
