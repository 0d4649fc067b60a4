"""The Triton kernels that gather blocks into payloads and scatter payloads into blocks: one launch for all planes and chunks.

A row is one block of one plane; a row is cut into tiles, and each program takes every n-th tile. Memory is known to the kernels
by int64 addresses only: a segment opened over IPC is labelled by torch with its exporter's device, and may be launched on there.
Works on host memory too, under Triton's interpreter, which is how it is tested without a GPU. Streams and the life of the
tables are the business of ``cuda.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from vcache.paged_kv import PagedKV

#: Bytes a program moves at a time, if a block is that large: 128 threads, each with eight 16-byte accesses in flight.
LARGEST_TILE_BYTES = 16 << 10
SMALLEST_TILE_BYTES = 2 << 10
NUM_WARPS = 4
#: Of payloads in segments, at least: nothing is wider than 16 bytes.
ALIGNMENT = 16
#: The word for each alignment; two int64 make a 16-byte access.
WORDS = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit
def _row_of_tile(  # type: ignore[no-untyped-def]
    tile, tiles_per_row, table, block_ids, payloads, wanted, num_planes, per_chunk
):
    """Where a tile's row lies: its address in the plane and in the payload, and its length in bytes; 0 if it is not wanted."""
    row = tile // tiles_per_row
    position = row % per_chunk
    plane = row // per_chunk % num_planes
    chunk = row // per_chunk // num_planes
    entry = table + plane * 4
    nbytes = tl.load(entry + 2)
    block = tl.load(block_ids + chunk * per_chunk + position)
    in_plane = tl.load(entry) + block * tl.load(entry + 1)
    in_payload = tl.load(payloads + chunk) + tl.load(entry + 3) * per_chunk + position * nbytes
    if wanted is not None:
        nbytes *= tl.load(wanted + chunk)
    return in_plane, in_payload, nbytes


@triton.jit
def _copy_tile(  # type: ignore[no-untyped-def]
    source, target, nbytes, tile_in_row, word: tl.constexpr, alignment: tl.constexpr, tile_words: tl.constexpr
):
    """Copy words ``tile_in_row * tile_words`` and on, as far as the row goes."""
    word_bytes: tl.constexpr = word.primitive_bitwidth // 8
    # Without these hints no access is wider than a word. One is an attribute of the operation that made its value, and is
    # lost on the result of an inlined call: hence here, on the casts.
    source = tl.multiple_of(source.to(tl.pointer_type(word)), alignment)
    target = tl.multiple_of(target.to(tl.pointer_type(word)), alignment)
    words = tl.multiple_of(nbytes // word_bytes, alignment // word_bytes)
    at = tile_in_row * tile_words + tl.arange(0, tile_words)
    tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)


# Not worth a compilation each: counts, and whether tables happen to begin at a multiple of 16.
_COUNTS = ["tiles", "tiles_per_row", "num_planes", "per_chunk"]
_TABLES = ["table", "block_ids", "payloads", "wanted"]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def gather_kernel(  # type: ignore[no-untyped-def]
    table,
    block_ids,
    payloads,
    wanted,
    tiles,
    tiles_per_row,
    num_planes,
    per_chunk,
    word: tl.constexpr,
    alignment: tl.constexpr,
    tile_words: tl.constexpr,
):
    """Blocks to payloads; see ``_arguments``."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        in_plane, in_payload, nbytes = _row_of_tile(
            tile, tiles_per_row, table, block_ids, payloads, wanted, num_planes, per_chunk
        )
        _copy_tile(in_plane, in_payload, nbytes, tile % tiles_per_row, word, alignment, tile_words)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def scatter_kernel(  # type: ignore[no-untyped-def]
    table,
    block_ids,
    payloads,
    wanted,
    tiles,
    tiles_per_row,
    num_planes,
    per_chunk,
    word: tl.constexpr,
    alignment: tl.constexpr,
    tile_words: tl.constexpr,
):
    """Payloads to blocks; see ``_arguments``."""
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        in_plane, in_payload, nbytes = _row_of_tile(
            tile, tiles_per_row, table, block_ids, payloads, wanted, num_planes, per_chunk
        )
        _copy_tile(in_payload, in_plane, nbytes, tile % tiles_per_row, word, alignment, tile_words)


class PlaneTable:
    """The planes of one ``PagedKV`` as the kernels read them: made once, kept on its device, valid while the planes are."""

    def __init__(self, kv: PagedKV) -> None:
        rows = []
        before = 0
        for plane in kv.planes:
            rows.append([plane.address, plane.stride_bytes, plane.block_bytes, before])
            before += plane.block_bytes
        #: int64 ``[planes, 4]``: address, stride, bytes of a block, bytes of a block in the planes before.
        self.rows = torch.tensor(rows, dtype=torch.int64, device=kv.device)
        self.largest_block_bytes = max(plane.block_bytes for plane in kv.planes)
        #: What divides every plane address, stride and length.
        self.alignment = gcd(*(number for row in rows for number in row))


#: ``gather`` or ``scatter``.
Launch = Callable[["PlaneTable", torch.Tensor, torch.Tensor, int, int, torch.Tensor | None], None]


def gather(
    table: PlaneTable,
    block_ids: torch.Tensor,
    payloads: torch.Tensor,
    alignment: int,
    programs: int,
    wanted: torch.Tensor | None = None,
) -> None:
    """Enqueue the copy of blocks into payloads on the current stream.

    ``block_ids`` is int64 ``[chunks, blocks_per_chunk]`` and ``payloads`` int64 ``[chunks]``, the addresses, both on the
    table's device, where they must stay until the kernel is done; ``alignment`` divides every payload address. Nothing is
    checked here. At most ``programs`` programs run, each with many tiles. ``wanted``, int64 ``[chunks]`` on the device, is 1 for
    the chunks to copy and 0 for those whose memory is not to be touched, by the time the kernel runs; default: all.
    """
    _launch(gather_kernel, table, block_ids, payloads, alignment, programs, wanted)


def scatter(
    table: PlaneTable,
    block_ids: torch.Tensor,
    payloads: torch.Tensor,
    alignment: int,
    programs: int,
    wanted: torch.Tensor | None = None,
) -> None:
    """Enqueue the copy of payloads into blocks on the current stream; arguments as for ``gather``."""
    _launch(scatter_kernel, table, block_ids, payloads, alignment, programs, wanted)


def word_and_alignment(table: PlaneTable, payload_alignment: int) -> tuple[tl.dtype, int]:
    """The widest word that fits every address and length, and the power of two up to 16 that divides them all."""
    alignment = gcd(table.alignment, payload_alignment, ALIGNMENT)
    return WORDS[alignment], alignment


def make_ready(kernel: Any, *arguments: Any, **options: Any) -> None:
    """Compiles and loads what launches with such arguments need, so that the first one does not wait for it. Launches nothing."""
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    if compiled is not None:  # else under Triton's interpreter
        compiled._init_handles()  # at the first launch it would; there, Triton 3.6 has a C compiler build what launches it


def compile_for(table: PlaneTable) -> None:
    """Has ready what copies of these planes need. Launches nothing."""
    one: torch.Tensor = torch.zeros((1, 1), dtype=torch.int64, device=table.rows.device)
    for kernel, wanted in ((gather_kernel, None), (gather_kernel, one[0]), (scatter_kernel, None)):
        positional, named, _ = _arguments(table, one, one[0], ALIGNMENT, wanted)
        make_ready(kernel, *positional, **named)


def _launch(
    kernel: Any,
    table: PlaneTable,
    block_ids: torch.Tensor,
    payloads: torch.Tensor,
    alignment: int,
    programs: int,
    wanted: torch.Tensor | None,
) -> None:
    positional, named, tiles = _arguments(table, block_ids, payloads, alignment, wanted)
    kernel[(min(programs, tiles),)](*positional, **named)


def _arguments(
    table: PlaneTable, block_ids: torch.Tensor, payloads: torch.Tensor, alignment: int, wanted: torch.Tensor | None
) -> tuple[list[Any], dict[str, Any], int]:
    """Cuts the rows into tiles: a kernel's positional and named arguments, and how many tiles there are."""
    num_planes = len(table.rows)
    chunks, per_chunk = block_ids.shape
    tile_bytes = min(LARGEST_TILE_BYTES, max(SMALLEST_TILE_BYTES, triton.next_power_of_2(table.largest_block_bytes)))
    tiles_per_row = -(-table.largest_block_bytes // tile_bytes)
    tiles = chunks * num_planes * per_chunk * tiles_per_row
    word, alignment = word_and_alignment(table, alignment)
    positional = [table.rows, block_ids, payloads, wanted, tiles, tiles_per_row, num_planes, per_chunk]
    tile_words = tile_bytes // (word.primitive_bitwidth // 8)
    return positional, {"word": word, "alignment": alignment, "tile_words": tile_words, "num_warps": NUM_WARPS}, tiles
