"""Payloads read from a store, in staging memory until whoever asked for them has used them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from vcache.store.base import Arrived, Got

if TYPE_CHECKING:
    import torch

    from vcache.store.calls import News
    from vcache.store.staging import Block


class Loaded:
    """Shards read from a store: ``results[i]`` and, where that is ``LOADED``, ``buffers[i]``.

    The buffers are staging memory, valid until ``release`` (or the end of a ``with``). There may be fewer than were asked
    for: as many, from the first on, as staging memory had room for.
    """

    def __init__(self, results: list[Got], blocks: list[Block | None]) -> None:
        self.results: Final = results
        self.blocks: Final = blocks

    def __len__(self) -> int:
        return len(self.results)

    @property
    def run(self) -> int:
        """How many shards, from the first on, were loaded."""
        return next((index for index, got in enumerate(self.results) if got is not Got.LOADED), len(self.results))

    def buffer(self, index: int) -> torch.Tensor:
        """The payload of a shard that was loaded: uint8, in host memory."""
        return self._block(index).tensor

    def offsets(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where the payloads of the shards from ``first`` to before ``last``, all loaded, begin in staging memory."""
        return np.array([self._block(index).payload_offset for index in range(first, last)], dtype=np.int64)

    def release(self) -> None:
        """Gives the memory back. Harmless when repeated."""
        for index, block in enumerate(self.blocks):
            self.blocks[index] = None
            if block is not None:
                block.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _block(self, index: int) -> Block:
        block = self.blocks[index]
        if block is None:
            raise ValueError(f"shard {index} was not loaded ({self.results[index].name}), or was released")
        return block


class Arrivals:
    """Shards of a batch that are loaded while others are under way: from the store's thread to the waiter's.

    ``error``: what the waiter's reaction raised; it is called no more then.
    """

    def __init__(self, loaded: Loaded, react: Callable[[Loaded], None]) -> None:
        self._loaded = loaded
        self._react = react
        self.error: Exception | None = None

    def of(self, indices: Sequence[int], news: News) -> Arrived:
        """What the store is to call, told positions among these shards."""
        return lambda positions: news.put(partial(self._heard, [indices[position] for position in positions]))

    def _heard(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._loaded.results[index] = Got.LOADED
        if self.error is None:
            try:
                self._react(self._loaded)
            except Exception as error:
                self.error = error
