"""Words and payloads of VRAM by plain copies: what a donor needs, without kernels, without torch and without memory for them."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np

from vcache.memory.base import WORD_BYTES, IndexArray, WordArray
from vcache.memory.cuda_driver import call, on_device

#: Words at most so far apart are read in one copy: a copy costs as much as a few thousand bytes in it.
_GAP_WORDS: Final = 256


class CudaWords:
    """By copies on the calling thread's current stream, in the order of whatever it enqueued there, which loads and stores wait for.

    CUDA promises nothing of when it takes bytes from memory that is not pinned, as numpy's, or when they arrive there ("might be
    synchronous", API synchronization behavior): hence a wait behind each copy.
    """

    def __init__(self, address: int, ordinal: int) -> None:
        self._address = address
        self._ordinal = ordinal

    def load(self, index: int) -> int:
        return int(self.load_run(index, 1)[0])

    def store(self, index: int, value: int) -> None:
        self.store_run(index, np.array([value], dtype=np.uint64))

    def store_run(self, start: int, values: WordArray) -> None:
        values = np.ascontiguousarray(values)
        with on_device(self._ordinal):
            at, stream = self._address + start * WORD_BYTES, current_stream(self._ordinal)
            call("cuMemcpyHtoDAsync", at, values.ctypes.data, values.nbytes, stream)
            call("cuStreamSynchronize", stream)

    def load_each(self, indices: IndexArray) -> WordArray:
        wanted, back = np.unique(indices, return_inverse=True)
        words: WordArray = np.empty(len(wanted), dtype=np.uint64)
        if len(wanted):
            with on_device(self._ordinal):
                stream = current_stream(self._ordinal)
                for part in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) > _GAP_WORDS) + 1):
                    at = wanted[part]
                    words[part] = self._load(int(at[0]), int(at[-1] - at[0]) + 1, stream)[at - at[0]]
        return words[back].reshape(indices.shape)

    def load_run(self, start: int, count: int) -> WordArray:
        with on_device(self._ordinal):
            return self._load(start, count, current_stream(self._ordinal))

    def fence(self) -> None:
        with on_device(self._ordinal):
            call("cuStreamSynchronize", current_stream(self._ordinal))

    def _load(self, start: int, count: int, stream: int) -> WordArray:
        found: WordArray = np.empty(count, dtype=np.uint64)
        call("cuMemcpyDtoHAsync", found.ctypes.data, self._address + start * WORD_BYTES, found.nbytes, stream)
        call("cuStreamSynchronize", stream)
        return found


def copy(source: int, target: int, nbytes: int, *, ordinal: int) -> None:
    """From address to address, on the calling thread's current stream of ``cuda:<ordinal>``; either may be host memory.

    Done on return: copies from and to pinned memory, and between devices, are not by themselves.
    """
    with on_device(ordinal):
        stream = current_stream(ordinal)
        call("cuMemcpyAsync", target, source, nbytes, stream)
        call("cuStreamSynchronize", stream)


def current_stream(ordinal: int) -> int:
    """The stream that the calling thread has chosen in torch; the default one where nobody has loaded torch to choose another."""
    return int(sys.modules["torch.cuda"].current_stream(ordinal).cuda_stream) if torch_uses_gpus() else 0


def torch_uses_gpus() -> bool:
    """Whether this process has loaded torch and used a GPU with it. Loads nothing."""
    torch_cuda: Any = sys.modules.get("torch.cuda")
    is_initialized = getattr(torch_cuda, "is_initialized", None)  # half imported, while another thread is at it
    return is_initialized is not None and bool(is_initialized())
