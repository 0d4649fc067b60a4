"""Payloads read from a store, in staging memory until whoever asked for them has used them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from vcache.store.base import Got

if TYPE_CHECKING:
    import torch

    from vcache.store.staging import Block


class Loaded:
    """Shards read from a store: ``results[i]`` and, where that is ``LOADED``, ``buffers[i]``.

    The buffers are staging memory, valid until ``release`` (or the end of a ``with``). There may be fewer than were asked
    for: as many, from the first on, as staging memory had room for.
    """

    def __init__(self, results: Sequence[Got], blocks: Sequence[Block | None]) -> None:
        self.results: Final = results
        self._blocks: Sequence[Block | None] = blocks

    def __len__(self) -> int:
        return len(self.results)

    @property
    def run(self) -> int:
        """How many shards, from the first on, were loaded."""
        return next((index for index, got in enumerate(self.results) if got is not Got.LOADED), len(self.results))

    def buffer(self, index: int) -> torch.Tensor:
        """The payload of a shard that was loaded: uint8, in host memory."""
        return self._block(index).tensor

    def offsets(self, count: int) -> npt.NDArray[np.int64]:
        """Where the payloads of the first ``count`` shards, all loaded, begin in staging memory."""
        return np.array([self._block(index).payload_offset for index in range(count)], dtype=np.int64)

    def release(self) -> None:
        """Gives the memory back. Harmless when repeated."""
        blocks, self._blocks = self._blocks, [None] * len(self.results)
        for block in blocks:
            if block is not None:
                block.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _block(self, index: int) -> Block:
        block = self._blocks[index]
        if block is None:
            raise ValueError(f"shard {index} was not loaded ({self.results[index].name}), or was released")
        return block
