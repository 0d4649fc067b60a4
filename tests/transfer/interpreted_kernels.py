"""The Triton kernels against the CPU path, under Triton's interpreter: ``test_triton_kernels.py`` runs this in a child process.

The interpreter is chosen by ``TRITON_INTERPRET=1`` when the kernels are imported, for the whole process: hence a child.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from tests.transfer.layouts import Layout, build, chunks_of, layouts, offsets_for
from vcache.paged_kv import PagedKV
from vcache.transfer import cpu, cuda, triton_kernels
from vcache.transfer.triton_kernels import Launch, PlaneTable, word_and_alignment

ALIGNMENTS = [1, 2, 4, 8, 16]


def run_kernel(
    launch: Launch,
    kv: PagedKV,
    blocks: np.ndarray,
    segment: torch.Tensor,
    offsets: np.ndarray,
    programs: int,
    wanted: torch.Tensor | None = None,
) -> None:
    """What ``cuda.py`` does, without a stream."""
    payloads = offsets + segment.data_ptr()
    alignment = int(np.gcd.reduce(payloads))
    launch(PlaneTable(kv), torch.from_numpy(blocks), torch.from_numpy(payloads), alignment, programs, wanted)


def aligned_bytes(nbytes: int, seed: int) -> torch.Tensor:
    """Random bytes at an address that is a multiple of 64."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)).clone()


@settings(max_examples=15)
@given(data=st.data(), layout=layouts(), align=st.sampled_from(ALIGNMENTS), programs=st.integers(1, 5))
@pytest.mark.parametrize(
    ("launch", "copy"), [(triton_kernels.gather, cpu.gather), (triton_kernels.scatter, cpu.scatter)]
)
def test_kernels_do_what_the_cpu_does(
    launch: Launch, copy: Callable[..., None], data: st.DataObject, layout: Layout, align: int, programs: int
) -> None:
    ours, theirs = build(layout, seed=1), build(layout, seed=1)
    blocks = np.array(data.draw(chunks_of(layout.num_blocks)))
    payload_bytes = ours.paged().payload_bytes(blocks.shape[1])
    starts, nbytes = data.draw(offsets_for(len(blocks), payload_bytes, align))
    offsets = np.array(starts)
    segment, expected = aligned_bytes(nbytes, seed=2), aligned_bytes(nbytes, seed=2)

    run_kernel(launch, ours.paged(), blocks, segment, offsets, programs)
    copy(theirs.paged(), blocks, expected, offsets)

    assert torch.equal(segment, expected)
    assert all(map(torch.equal, ours.memory, theirs.memory))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("block_bytes", [48, 40 << 10])
def test_every_width_of_access_and_blocks_of_several_tiles(alignment: int, block_bytes: int) -> None:
    planes = aligned_bytes(2 * 4 * block_bytes, seed=1).view(2, 4, block_bytes)
    kv = PagedKV(list(planes.unbind(0)), block_size=1)
    segment = torch.zeros(64 + 4 * block_bytes, dtype=torch.uint8)
    blocks, offsets = np.array([[3, 0]]), np.array([alignment])
    assert word_and_alignment(PlaneTable(kv), segment.data_ptr() + alignment)[1] == alignment

    run_kernel(triton_kernels.gather, kv, blocks, segment, offsets, programs=3)
    assert torch.equal(segment[alignment : alignment + 4 * block_bytes].view(2, 2, -1), planes[:, [3, 0]])
    assert not segment[:alignment].any() and not segment[alignment + 4 * block_bytes :].any()

    stored = planes.clone()
    planes.zero_()
    run_kernel(triton_kernels.scatter, kv, blocks, segment, offsets, programs=3)
    assert torch.equal(planes[:, [3, 0]], stored[:, [3, 0]])
    assert not planes[:, [1, 2]].any()


def test_planes_of_different_block_sizes() -> None:
    wide, narrow = aligned_bytes(5 * 4096, seed=1).view(5, 4096), aligned_bytes(5 * 24, seed=2).view(5, 24)
    kv = PagedKV([wide, narrow], block_size=8)
    segment, expected = torch.zeros(8240, dtype=torch.uint8), torch.zeros(8240, dtype=torch.uint8)
    run_kernel(triton_kernels.gather, kv, np.array([[4, 1]]), segment, np.array([0]), programs=2)
    cpu.gather(kv, np.array([[4, 1]]), expected, np.array([0]))
    assert torch.equal(segment, expected)


def test_of_what_is_not_wanted_no_byte_is_written() -> None:
    planes = aligned_bytes(2 * 6 * 4096, seed=1).view(2, 6, 4096)
    kv = PagedKV(list(planes.unbind(0)), block_size=1)
    segment, expected = aligned_bytes(3 * 4 * 4096, seed=2), aligned_bytes(3 * 4 * 4096, seed=2)
    blocks, offsets = np.array([[3, 0], [1, 2], [5, 4]]), np.array([4, 0, 2]) * 4096 * 2
    run_kernel(triton_kernels.gather, kv, blocks, segment, offsets, programs=3, wanted=torch.tensor([1, 0, 1]))
    cpu.gather(kv, blocks[[0, 2]], expected, offsets[[0, 2]])
    assert torch.equal(segment, expected)


def test_what_a_call_in_inference_mode_left_behind_serves_calls_outside_of_it() -> None:
    planes = aligned_bytes(2 * 4 * 64, seed=1).view(2, 4, 64)
    kv = PagedKV(list(planes.unbind(0)), block_size=1)
    segment, blocks, offsets = torch.zeros(4 * 64, dtype=torch.uint8), np.array([[3, 0]]), np.array([0])
    with torch.inference_mode():
        cuda.gather(kv, blocks, segment, offsets)
    stored = planes.clone()
    planes.zero_()
    cuda.scatter(kv, blocks, segment, offsets)
    assert torch.equal(planes[:, [3, 0]], stored[:, [3, 0]])


def test_this_is_the_interpreter() -> None:
    assert isinstance(triton_kernels.gather_kernel, InterpretedFunction)
