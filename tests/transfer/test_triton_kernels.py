"""The GPU kernels as far as they go without a GPU: what they do, by Triton's interpreter; how wide they access, by compiling."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.processes import REPOSITORY, child_environment
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
