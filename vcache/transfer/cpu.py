"""Copies between planes and payloads in host memory, by a few threads that do not hold the GIL.

One call of a function in C (``copy_blocks.c``) moves all chunks, with non-temporal stores. docs/benchmarks/notes.md has the
figures, and those of the ways not taken; torch's own threads, for one, wait for each other within every operation, which costs
most of the speed as soon as something else keeps a core busy.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from vcache.native import native_library
from vcache.paged_kv import PagedKV
from vcache.transfer.checks import CheckedCopy, Int64Array, check_gather, check_one_kind, check_scatter
from vcache.transfer.threads import LIBRARY, default_threads, helpers

#: What is worth another thread: waking it takes 30 to 50 us, in which a thread copies half as much.
BYTES_PER_THREAD = 1 << 20
#: What a thread takes at a time: little enough that all end at about the same time.
STEP_BYTES = 256 << 10

_TABLE_ROW_BYTES: Final = 32  # of ``PagedKV.table``


def gather(kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0) -> None:
    """Copy the blocks of each chunk into its payload; done when it returns. See ``vcache.transfer.gather``."""
    _copy(kv, check_gather(kv, block_ids, segment, offsets), segment, to_payload=True, threads=threads)


def scatter(
    kv: PagedKV, block_ids: Int64Array, segment: torch.Tensor, offsets: Int64Array, *, threads: int = 0
) -> None:
    """Copy each payload into the blocks of its chunk; done when it returns. See ``vcache.transfer.scatter``."""
    _copy(kv, check_scatter(kv, block_ids, segment, offsets), segment, to_payload=False, threads=threads)


def _copy(kv: PagedKV, copy: CheckedCopy, segment: torch.Tensor, *, to_payload: bool, threads: int) -> None:
    check_one_kind(kv, segment)
    chunks, per_chunk = copy.block_ids.shape
    planes = len(kv.planes)
    _vcache_copy(
        kv.table,
        len(kv.table) // _TABLE_ROW_BYTES,
        copy.block_ids.tobytes(),
        per_chunk,
        segment.data_ptr(),
        copy.offsets.tobytes(),
        chunks,
        max(1, STEP_BYTES * planes // kv.block_bytes),
        helpers(min(threads or default_threads(), copy.nbytes // BYTES_PER_THREAD) - 1),
        to_payload,
    )


def _load() -> ctypes._NamedFuncPointer:
    function = native_library(LIBRARY).vcache_copy
    number, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [address, number, address, number, address, address, number, number, ctypes.c_int, ctypes.c_int]
    function.restype = None
    return function


_vcache_copy = _load()
