"""The interface of a store below the pool.

A store keeps *shards*, one rank's payload of one chunk. All calls are batched; they may block and may raise, so nobody on a
serving path calls an implementation directly: deadlines, retries and the breaker are the guard's business, not each
store's. Buffers are the caller's: one-dimensional uint8 tensors in host memory of exactly the payload's size, valid and
unshared until the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from vcache.keys import ChunkKey


class Shard(NamedTuple):
    """Names one object of a store, by ``key`` and ``rank``; the rest says what its payload must be to count as loaded."""

    key: ChunkKey
    rank: int
    ranks: int = 1
    layout: int = (
        0  # ``PagedKV.payload_layout`` of the planes it was gathered from; what only asks or removes needs none
    )


class Got(IntEnum):
    """What ``get_into`` did for one shard."""

    LOADED = 0  # every byte of the buffer is the shard's
    ABSENT = 1
    INVALID = 2  # an object was there, but its header or checksum was not this shard's; the store has removed it
    FAILED = 3  # it may be there: the store, or the owner of its bytes, did not deliver
    INTERRUPTED = 4  # as FAILED, but of the kind that often goes well at the next try


class Put(IntEnum):
    """What ``put_from`` did for one shard."""

    STORED = 0
    EXISTS = 1  # the store had it already; nothing was written
    FULL = 2
    FAILED = 3


#: Takes the positions in a batch of shards that are loaded while others still are not.
Arrived = Callable[[Sequence[int]], None]


class Store(Protocol):
    """A place for shards that outlives the pool's segments. Implementations are thread-safe."""

    def contains(self, shards: Sequence[Shard]) -> Sequence[bool]:
        """Whether each shard is there now. No promise that it still is when it is asked for."""
        ...

    def get_into(
        self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor], arrived: Arrived | None = None
    ) -> Sequence[Got]:
        """Fills ``buffers[i]`` with ``shards[i]``. Only after ``LOADED`` does a buffer hold anything one may use.

        ``arrived`` may be told of shards as they are loaded, which their answer then confirms: their buffers hold every byte,
        and the store touches them no more. It is called in the calling thread, and is quick.
        """
        ...

    def put_from(self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Put]:
        """Stores ``buffers[i]`` as ``shards[i]``: afterwards the shard is there whole, or not at all."""
        ...

    def remove(self, shards: Sequence[Shard]) -> int | None:
        """Removes shards; how many were there. A removed shard does not come back by itself.

        ``None``: of some it cannot say that they are gone; the others are.
        """
        ...

    def counters(self) -> Mapping[str, int]:
        """What only this kind of store can count, by names that begin with ``store_``. They only ever grow."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the store, finishing what is under way for at most ``timeout_s``. Calling it twice is harmless.

        Any other call then raises ``UnavailableError``.
        """
        ...
