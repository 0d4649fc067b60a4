"""Shards and payloads to store, and ways to break a store that the guard stands before."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

import torch

from vcache.keys import ChunkKey
from vcache.store.base import Got, Put, Shard, Store


def shard(number: int, rank: int = 0) -> Shard:
    return Shard(ChunkKey(hashlib.sha256(str(number).encode()).digest()[:16]), rank)


def shards(count: int) -> list[Shard]:
    return [shard(number) for number in range(count)]


def payload(number: int, nbytes: int = 10_000) -> torch.Tensor:
    """Bytes that no other number has."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def payloads(count: int, nbytes: int = 10_000) -> list[torch.Tensor]:
    return [payload(number, nbytes) for number in range(count)]


def blank(count: int, nbytes: int = 10_000) -> list[torch.Tensor]:
    return [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]


class Gate:
    """A real store whose calls can be made to hang or to raise, at its own interface."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.inside = 0  # calls now hanging
        self.calls = 0

    def contains(self, wanted: Sequence[Shard]) -> Sequence[bool]:
        self._pass()
        return self._store.contains(wanted)

    def get_into(self, wanted: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Got]:
        self._pass()
        return self._store.get_into(wanted, buffers)

    def put_from(self, given: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Put]:
        self._pass()
        return self._store.put_from(given, buffers)

    def remove(self, unwanted: Sequence[Shard]) -> int | None:
        self._pass()
        return self._store.remove(unwanted)

    def counters(self) -> Mapping[str, int]:
        return self._store.counters()

    def close(self, timeout_s: float = 10.0) -> None:
        self._store.close(timeout_s)

    def _pass(self) -> None:
        self.calls += 1
        self.inside += 1
        self.open.wait()
        self.inside -= 1
        if self.error is not None:
            raise self.error
