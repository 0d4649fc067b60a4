"""The GPU kernels as far as they go without a GPU: what they do, by Triton's interpreter; how wide they access, by compiling."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from tests.support.processes import REPOSITORY, child_environment
from vcache.paged_kv import PagedKV
from vcache.pool import record_kernels
from vcache.transfer import triton_kernels


def test_kernels_agree_with_the_cpu_path_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/transfer/interpreted_kernels.py"]
    environment = child_environment(extra={"TRITON_INTERPRET": "1"})
    child = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize(
    ("kernel", "is_masked"),
    [
        (triton_kernels.gather_kernel, False),
        (triton_kernels.gather_kernel, True),
        (triton_kernels.scatter_kernel, False),
    ],
)
@pytest.mark.parametrize(("alignment", "access"), [(16, "v2.b64"), (8, "b64"), (4, "b32"), (2, "b16"), (1, "b8")])
def test_compiled_for_an_h100_the_kernels_access_memory_as_widely_as_the_alignment_allows(
    kernel: object, is_masked: bool, alignment: int, access: str
) -> None:
    """Compiling needs no GPU. Without the hints in the kernel no 16-byte access would be left."""
    word = triton_kernels.WORDS[alignment]
    pointers = dict.fromkeys(["table", "block_ids", "payloads"], "*i64")
    counts = dict.fromkeys(["tiles", "tiles_per_row", "num_planes", "per_chunk"], "i32")
    constants = {"word": word, "alignment": alignment, "tile_words": 16_384 // (word.primitive_bitwidth // 8)}
    if is_masked:
        pointers["wanted"] = "*i64"
    else:
        constants["wanted"] = None
    source = ASTSource(kernel, {**pointers, **counts, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {access}
    assert access in re.findall(r"ld\.global\.(\S+)", ptx)


class Hopper:
    """As much of a driver as Triton needs to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_what_was_compiled_ahead_serves_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", Hopper())
    loaded: list[CompiledKernel] = []

    def load(kernel: CompiledKernel) -> None:
        loaded.append(kernel)

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    caches = [torch.zeros(16, 2, 64, dtype=torch.uint8) for _ in range(3)]
    kv = PagedKV(caches, block_size=16, num_blocks=16)
    table = triton_kernels.PlaneTable(kv)
    triton_kernels.compile_for(table)
    record_kernels.compile_all()
    kernels = {
        triton_kernels.gather_kernel: 2,  # with and without a mask
        triton_kernels.scatter_kernel: 1,
        record_kernels.mark_kernel: 1,
        record_kernels.commit_kernel: 1,
        record_kernels.validate_kernel: 1,
    }

    def compiled() -> list[int]:
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    assert compiled() == list(kernels.values())
    assert len({kernel.hash for kernel in loaded}) == sum(kernels.values())
    memory = torch.zeros(64, dtype=torch.int64)
    for chunks, per_chunk in ((1, 3), (3, 1), (2, 5), (4, 4)):  # tables that begin at multiples of 16, and that do not
        blocks, payloads = memory[: chunks * per_chunk].view(chunks, per_chunk), memory[chunks * per_chunk :][:chunks]
        for kernel, wanted in (
            (triton_kernels.gather_kernel, None),
            (triton_kernels.gather_kernel, memory[1 : 1 + chunks]),
            (triton_kernels.scatter_kernel, None),
        ):
            positional, named, _ = triton_kernels._arguments(table, blocks, payloads, 4096, wanted)
            kernel.warmup(*positional, grid=(1,), **named)
        at = memory.data_ptr() + 8 * chunks
        for kernel, addresses in ((record_kernels.mark_kernel, 2), (record_kernels.commit_kernel, 3)):
            kernel.warmup(*[at] * addresses, chunks, grid=(1,), num_warps=1)
    assert compiled() == list(kernels.values())
