"""The kernels on records as far as they go without a GPU: what they do, by Triton's interpreter; in what order, by compiling."""

from __future__ import annotations

import re
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.processes import REPOSITORY, child_environment
from vcache.pool import record_kernels

#: An access to memory other than the program's own, or a barrier, as it stands in PTX.
STEP = re.compile(r"\b(?:ld|st|atom|red)\.\S*(?:global|sys)\S*|\bbar\.\S+")


def steps(kernel: object, *addresses: str) -> list[str]:
    source = ASTSource(kernel, {**dict.fromkeys(addresses, "i64"), "count": "i32"})
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
    return STEP.findall(ptx)


def test_they_do_what_the_host_does_under_the_interpreter() -> None:
    files = ["tests/pool/test_enqueued_records.py", "tests/pool/test_copies_by_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = child_environment(extra={"TRITON_INTERPRET": "1"})
    child = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def test_a_mark_stores_the_row_then_meets_at_a_barrier_then_releases_the_generation() -> None:
    compiled = steps(record_kernels.mark_kernel, "arguments", "marked")
    row = [at for at, step in enumerate(compiled) if step == "st.global.b64"]
    release = compiled.index("st.release.sys.global.b64")
    assert compiled.index("ld.acquire.sys.global.b64") < row[0]
    assert row[-2] < release < row[-1]  # the last is the verdict
    assert "bar.sync" in compiled[row[-2] : release]
    assert compiled.count("st.release.sys.global.b64") == 1


def test_a_commit_acquires_the_generation_and_releases_the_next() -> None:
    compiled = steps(record_kernels.commit_kernel, "arguments", "marked", "verdicts")
    assert compiled[-3:] == ["ld.acquire.sys.global.b64", "st.release.sys.global.b64", "st.global.b64"]


def test_a_validation_acquires_every_word_and_stores_nothing_but_the_verdict() -> None:
    compiled = steps(record_kernels.validate_kernel, "arguments", "verdicts")
    assert compiled[-5:] == ["ld.acquire.sys.global.b64"] * 4 + ["st.global.b64"]
    assert [step for step in compiled if step.startswith(("st", "atom", "red"))] == ["st.global.b64"]
