"""What a segment needs of its memory, wherever that is: bytes for payloads, aligned 8-byte words for its directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # a stand-alone donor of host memory never loads torch
    import torch

WordArray = npt.NDArray[np.uint64]
IndexArray = npt.NDArray[np.int64]

WORD_BYTES = 8


#: What the handles of CUDA IPC begin with, whose memory must not be used once its exporter has freed it, or is dead.
IPC = b"ipc "


def is_host(device: str) -> bool:
    """Whether a device ("cpu:0", a GPU's UUID, "cuda:1") is the host: how memory is opened follows from it, not from its tier."""
    return device.startswith("cpu:")


class Words(Protocol):
    """The memory as 8-byte words, counted from its beginning. Every word is read and written whole, never torn.

    Stores become visible to other processes in the order in which they were made.
    """

    def load(self, index: int) -> int:
        """One word."""

    def store(self, index: int, value: int) -> None:
        """One word."""

    def store_run(self, start: int, values: WordArray) -> None:
        """Words from ``start`` on, in ascending order."""

    def load_each(self, indices: IndexArray) -> WordArray:
        """The words at ``indices`` (any shape), after everything that the calling thread has read before."""

    def load_run(self, start: int, count: int) -> WordArray:
        """A copy of ``count`` words; each whole, but not all of one instant."""

    def fence(self) -> None:
        """Returns once whatever the calling thread had copied into the memory is visible before any later store."""


class Memory(Protocol):
    """A contiguous piece of memory that several processes see. Zeros at first. Who made it owns it; others have opened it."""

    @property
    def device(self) -> str:
        """ "cpu:0", or a GPU's UUID."""

    @property
    def nbytes(self) -> int: ...

    @property
    def handle(self) -> bytes:
        """What another process of this host needs to open it."""

    @property
    def address(self) -> int:
        """Where it begins in this process, or on its device. Valid until ``close``."""

    @property
    def tensor(self) -> torch.Tensor:
        """All of it as uint8 ``[nbytes]``, no copy. Not to be asked for after ``close``; see there for how long it lives."""

    @property
    def words(self) -> Words:
        """Its words. Valid until ``close``."""

    def close(self) -> None:
        """Gives it up: its owner frees it (other processes keep what they have mapped), others unmap it.

        Harmless when called twice. Nobody may use words or address afterwards. Host memory stays mapped for as long as
        somebody holds its tensor, so that a late user reads stale bytes instead of crashing; device memory does not.
        """
