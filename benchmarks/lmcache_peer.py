"""LMCache in this process, by default its LocalCPU backend and nothing below: one of the peers VCache is measured against.

LMCache's own kernels between paged KV and its chunks need CUDA. On a CPU a connector has to be given, and this one is made
of torch's fastest means: one operation a chunk over all layers.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

_instances: Final = itertools.count()


class LMCacheEngine(Protocol):
    """What is used of ``lmcache.v1.cache_engine.LMCacheEngine``."""

    token_database: Any

    def lookup(self, tokens: object = None, *, hashes: object = None, offsets: object = None, **pin: object) -> int: ...

    def lookup_unpin(self, lookup_id: str) -> None: ...

    def store(self, tokens: object, **places: object) -> None: ...

    def retrieve(self, tokens: object, **places: object) -> torch.Tensor: ...

    def clear(self) -> int: ...


class PagedStorage:
    """A serving engine's KV in host memory: ``[planes, blocks, block_size, ...]``. ``block_ids``: where the prompt's blocks lie."""

    def __init__(self, tensor: torch.Tensor, block_ids: npt.NDArray[np.int64]) -> None:
        self.tensor = tensor
        self.block_size = tensor.shape[2]
        # Complex numbers of 16 bytes: with them torch copies twice as fast by an index as with bfloat16.
        self.planes = tensor.flatten(2).view(torch.complex128)
        self._ids = torch.from_numpy(block_ids)
        self._first = [int(block) for block in block_ids]
        self._goes_on = np.diff(block_ids) == 1

    def copy_out(self, target: torch.Tensor, start: int, end: int) -> None:
        """The blocks of tokens ``start`` to ``end`` into a chunk."""
        begin, count = start // self.block_size, (end - start) // self.block_size
        view = self._chunk(target, count)
        if self._are_neighbours(begin, count):
            view.copy_(self.planes[:, self._first[begin] : self._first[begin] + count])
        else:
            torch.index_select(self.planes, 1, self._ids[begin : begin + count], out=view)

    def copy_in(self, source: torch.Tensor, start: int, end: int) -> None:
        """The other way."""
        begin, count = start // self.block_size, (end - start) // self.block_size
        view = self._chunk(source, count)
        if self._are_neighbours(begin, count):
            self.planes[:, self._first[begin] : self._first[begin] + count].copy_(view)
        else:
            self.planes.index_copy_(1, self._ids[begin : begin + count], view)

    def _chunk(self, chunk: torch.Tensor, count: int) -> torch.Tensor:
        """A chunk's bytes as blocks of all planes. LMCache's chunks have K of all layers before V; here bytes are bytes."""
        return chunk.view(-1).view(torch.complex128).view(self.planes.shape[0], count, -1)

    def _are_neighbours(self, begin: int, count: int) -> bool:
        return bool(self._goes_on[begin : begin + count - 1].all())


@contextmanager
def lmcache_engine(
    *,
    kv_shape: Sequence[int],
    chunk_size: int,
    nbytes: int,
    storage: PagedStorage | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[LMCacheEngine]:
    """An engine whose chunks are ``kv_shape`` = (layers, 2, chunk_size, heads, head_size), with ``nbytes`` of host memory.

    ``settings``: of LMCache's configuration, over those that keep chunks in its own host memory.
    """
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")  # its errors here are about several engines in one process
    from lmcache.v1.cache_engine import LMCacheEngineBuilder
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.gpu_connector import GPUConnectorInterface
    from lmcache.v1.metadata import LMCacheMetadata

    for name in ("lmcache", "lmcache.v1"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Connector(GPUConnectorInterface):  # type: ignore[misc]
        def from_gpu(self, memory_obj: Any, start: int, end: int, **_: object) -> None:
            assert storage is not None
            storage.copy_out(memory_obj.tensor, start, end)

        def to_gpu(self, memory_obj: Any, start: int, end: int, **_: object) -> None:
            assert storage is not None
            storage.copy_in(memory_obj.tensor, start, end)

        def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: object) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.from_gpu(memory_obj, start, end)

        def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: object) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.to_gpu(memory_obj, start, end)

        def get_shape(self, num_tokens: int) -> torch.Size:
            return torch.Size((2, kv_shape[0], num_tokens, kv_shape[3] * kv_shape[4]))

    name = f"vcache-bench-{next(_instances)}"
    own = {"local_cpu": True, "max_local_cpu_size": nbytes / (1 << 30), "save_unfull_chunk": False}
    config = LMCacheEngineConfig.from_defaults(chunk_size=chunk_size, **{**own, **(settings or {})})
    metadata = LMCacheMetadata("benchmark", 1, 1, 0, 0, torch.bfloat16, tuple(kv_shape), chunk_size=chunk_size)
    engine = LMCacheEngineBuilder.get_or_create(
        name, config, metadata, Connector(), lambda tensor, source: None, lambda thing, source: thing
    )
    engine.post_init()
    try:
        yield engine
    finally:
        LMCacheEngineBuilder.destroy(name)
