"""The Triton kernels that mark, commit and validate records in VRAM: one launch for all records of a call.

The steps are those of ``records.Directory``, each in a launch of its own, in the order of the stream that also copies the payloads. Memory
is known to the kernels by int64 addresses only, as it is to those that copy. Arguments are read from pinned memory, and verdicts
written to it. A program sees to ``RECORDS`` records.

What other processes, and other GPUs, rely on is PTX's memory model. The completion of a kernel *synchronizes* with the start of the
next one of its stream, and so do an event's record and whoever waits for it. A release is cumulative: who acquires the generation
that ``commit`` stored with release at system scope sees what happened before it, the payload's bytes among it, although a kernel
before it wrote them, on all its multiprocessors. A plain store would order nothing for others, nor would a release at the scope
of the GPU for another GPU or the host. In the same way the words of a record come before its odd generation: they are stored by several
threads of the program, which a barrier joins before the release. The loads that validate are acquires at system
scope, so that they are answered by the memory itself, by no cache that may be older than the copy before them.

Loads and stores in assembly, and no ``tl.atomic_*``: these would be read-modify-writes, which two GPUs without native atomics
between them cannot do to each other's memory.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from vcache.pool.records import GENERATION, KEY, LAYOUT, RECORD_WORDS
from vcache.transfer.triton_kernels import make_ready

RECORDS: Final = 32
#: Of 64 bits, as all are.
_SOME_ADDRESS: Final = 1 << 40
#: What is at a record, by ``commit``'s verdict.
REFUSED, LOST, COMMITTED = 0, 1, 2
#: Bits of ``validate``'s verdict.
HELD, OF_LAYOUT = 1, 2

#: One 8-byte word at address $1; at address $1 the word $2, where $3 is not 0. Kept apart, so that tests can read them.
LOAD_ACQUIRE: Final = tl.constexpr(
    "{ .reg .pred wanted; setp.ne.b32 wanted, $2, 0; mov.b64 $0, 0; @wanted ld.acquire.sys.global.b64 $0, [$1]; }"
)
STORE_RELEASE: Final = tl.constexpr(
    "{ .reg .pred wanted; setp.ne.b32 wanted, $3, 0; mov.b32 $0, 0; @wanted st.release.sys.global.b64 [$1], $2; }"
)
_GENERATION: Final = tl.constexpr(GENERATION)
_KEY: Final = tl.constexpr(KEY)
_LAYOUT: Final = tl.constexpr(LAYOUT)
_WORDS: Final = tl.constexpr(RECORD_WORDS)
_RECORDS: Final = tl.constexpr(RECORDS)


@triton.jit
def _load_acquire(address, wanted):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        LOAD_ACQUIRE, "=&l,l,r", [address, wanted.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _store_release(address, word, wanted):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        STORE_RELEASE, "=&r,l,l,r", [address, word, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["arguments", "marked", "count"])
def mark_kernel(arguments, marked, count):  # type: ignore[no-untyped-def]
    """See ``mark``."""
    at = tl.program_id(0) * _RECORDS + tl.arange(0, _RECORDS)
    is_one = at < count
    table = arguments.to(tl.pointer_type(tl.int64))
    record = tl.load(table + at, mask=is_one, other=0)
    word = tl.arange(0, _WORDS)
    rows = table + count + at[:, None] * _WORDS + word[None, :]
    generation = tl.load(table + count + at * _WORDS + _GENERATION, mask=is_one, other=0)
    is_free = is_one & (_load_acquire(record + _GENERATION * 8, is_one) == 0)
    is_covered = is_free[:, None] & (word < _GENERATION)[None, :]
    row = tl.load(rows, mask=is_covered, other=0)
    tl.store((record[:, None] + word[None, :] * 8).to(tl.pointer_type(tl.int64)), row, mask=is_covered)
    tl.debug_barrier()
    _store_release(record + _GENERATION * 8, generation - 1, is_free)
    tl.store(marked.to(tl.pointer_type(tl.int64)) + at, is_free.to(tl.int64), mask=is_one)


@triton.jit(do_not_specialize=["arguments", "marked", "verdicts", "count"])
def commit_kernel(arguments, marked, verdicts, count):  # type: ignore[no-untyped-def]
    """See ``commit``."""
    at = tl.program_id(0) * _RECORDS + tl.arange(0, _RECORDS)
    is_one = at < count
    table = arguments.to(tl.pointer_type(tl.int64))
    record = tl.load(table + at, mask=is_one, other=0)
    generation = tl.load(table + count + at * _WORDS + _GENERATION, mask=is_one, other=0)
    was_marked = tl.load(marked.to(tl.pointer_type(tl.int64)) + at, mask=is_one, other=0)
    held = _load_acquire(record + _GENERATION * 8, is_one)
    is_ours = is_one & (was_marked != 0) & (held == generation - 1)
    _store_release(record + _GENERATION * 8, generation, is_ours)
    tl.store(verdicts.to(tl.pointer_type(tl.int64)) + at, was_marked + is_ours.to(tl.int64), mask=is_one)


@triton.jit(do_not_specialize=["arguments", "verdicts", "count"])
def validate_kernel(arguments, verdicts, count):  # type: ignore[no-untyped-def]
    """See ``validate``."""
    at = tl.program_id(0) * _RECORDS + tl.arange(0, _RECORDS)
    is_one = at < count
    table = arguments.to(tl.pointer_type(tl.int64))
    record = tl.load(table + at, mask=is_one, other=0)
    generation = tl.load(table + count + at, mask=is_one, other=0)
    low = tl.load(table + 2 * count + 2 * at, mask=is_one, other=0)
    high = tl.load(table + 2 * count + 2 * at + 1, mask=is_one, other=0)
    layout = tl.load(table + 4 * count)
    is_low = _load_acquire(record + _KEY * 8, is_one) == low
    is_high = _load_acquire(record + (_KEY + 1) * 8, is_one) == high
    is_of_layout = _load_acquire(record + _LAYOUT * 8, is_one) == layout
    # Last: a record that holds this generation now has held it since it was committed, with these words.
    is_held = (_load_acquire(record + _GENERATION * 8, is_one) == generation) & is_low & is_high
    tl.store(
        verdicts.to(tl.pointer_type(tl.int64)) + at, is_held.to(tl.int64) + 2 * is_of_layout.to(tl.int64), mask=is_one
    )


def compile_all() -> None:
    """Has them ready on the current device, so that the first calls do not have to wait for it. Launches nothing."""
    for kernel, addresses in ((mark_kernel, 2), (commit_kernel, 3), (validate_kernel, 2)):
        make_ready(kernel, *[_SOME_ADDRESS] * addresses, 1, num_warps=1)


def mark(arguments: torch.Tensor, marked: torch.Tensor, count: int) -> None:
    """Enqueue on the current stream: those of ``count`` records that are free get their row, then its odd generation.

    ``arguments`` is int64 ``[count * 17]``: the addresses of the records, then their rows as ``records.pack`` makes them.
    ``marked`` int64 ``[count]``, on the device: 1 for those that were free, 0 for the others, of which nothing is written.
    """
    mark_kernel[_grid(count)](arguments.data_ptr(), marked.data_ptr(), count, num_warps=1)


def commit(arguments: torch.Tensor, marked: torch.Tensor, verdicts: torch.Tensor, count: int) -> None:
    """Enqueue on the current stream: those that ``mark`` marked, and still have that generation, get the even one.

    ``arguments`` and ``marked`` as ``mark`` had them; ``verdicts`` int64 ``[count]``: ``COMMITTED``, ``LOST`` or ``REFUSED``.
    """
    commit_kernel[_grid(count)](arguments.data_ptr(), marked.data_ptr(), verdicts.data_ptr(), count, num_warps=1)


def validate(arguments: torch.Tensor, verdicts: torch.Tensor, count: int) -> None:
    """Enqueue on the current stream: what ``count`` records hold now.

    ``arguments`` is int64 ``[count * 4 + 1]``: addresses, even generations, keys ``[count, 2]``, one layout. ``verdicts`` int64
    ``[count]``: ``HELD`` where generation and key are those, plus ``OF_LAYOUT`` where the layout is.
    """
    validate_kernel[_grid(count)](arguments.data_ptr(), verdicts.data_ptr(), count, num_warps=1)


def _grid(count: int) -> tuple[int]:
    return (-(-count // RECORDS),)
