"""What `vcache doctor` finds out about sharing VRAM, over the stand-in of the driver: which handles work, between which devices."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.processes import PATIENCE_S, REPOSITORY, child_environment

PROGRAM = """
import json
from vcache.config import VCacheConfig
from vcache.doctor.gpus import pinning, sharing
config = VCacheConfig()
findings = [*sharing(config, timeout_s=60), pinning(config)]
print(json.dumps({found.about: (found.state, found.detail, found.fix) for found in findings}))
"""


@pytest.fixture
def examined(stand_in, runtime_dir):
    def examine(*, handles="auto", directory=runtime_dir, **settings):
        chosen = {f"STAND_IN_{name.upper()}": value for name, value in settings.items()}
        chosen |= {"VCACHE_SEGMENT__CUDA_HANDLES": handles, "VCACHE_RUNTIME_DIR": str(directory)}
        child = child_environment(extra={**stand_in, **chosen})
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(
            command, env=child, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        assert not list(runtime_dir.glob("*.sock"))
        return {about: tuple(finding) for about, finding in json.loads(done.stdout).items()}

    return examine


def test_where_both_kinds_work_all_is_well(examined):
    found = examined()
    assert list(found) == [
        *("VMM handles on cuda:0", "CUDA IPC on cuda:0", "cuda:1 with memory of cuda:0"),
        *("VMM handles on cuda:1", "CUDA IPC on cuda:1", "cuda:0 with memory of cuda:1"),
        "host memory of the pool",
    ]
    assert {state for state, _, _ in found.values()} == {"ok"}
    assert found["cuda:1 with memory of cuda:0"][1] == "reads it directly (VMM handles)"


def test_without_a_runtime_directory_nothing_is_tried(examined, tmp_path):
    (tmp_path / "file").touch()
    found = examined(directory=tmp_path / "file")
    assert list(found) == ["host memory of the pool"]
    assert "runtime_dir = " in found["host memory of the pool"][1]


def test_a_kind_that_does_not_work_is_a_note_while_the_other_does(examined):
    found = examined(fail="cuMemImportFromShareableHandle", peers="0")
    state, detail, fix = found["VMM handles on cuda:0"]
    assert state == "note" and "cuMemImportFromShareableHandle" in detail
    assert "segment.cuda_handles" in fix and found["CUDA IPC on cuda:0"][0] == "ok"
    state, detail, _ = found["cuda:1 with memory of cuda:0"]
    assert state == "note" and "no peer access" in detail


def test_a_kind_that_was_asked_for_and_does_not_work_is_a_problem(examined):
    found = examined(handles="vmm", lacks="103")
    assert found["VMM handles on cuda:0"][:1] == ("problem",)
    assert "no handles by file descriptor" in found["VMM handles on cuda:0"][1]
    assert found["CUDA IPC on cuda:0"][0] == "ok"
    assert found["cuda:1 with memory of cuda:0"][1] == "reads it directly (CUDA IPC)"


def test_no_kind_at_all_is_a_problem(examined):
    found = examined(fail="cuMemcpyDtoHAsync")
    del found["host memory of the pool"]
    assert {state for state, _, _ in found.values()} == {"problem"}
    assert all("another process cannot read this one's memory" in detail for _, detail, _ in found.values())
    assert not any("with memory of" in about for about in found)


def test_host_memory_that_cannot_be_pinned_is_a_problem(examined):
    state, detail, fix = examined(fail="cuMemHostRegister")["host memory of the pool"]
    assert state == "problem" and "cuMemHostRegister" in detail
    assert "ulimit -l" in fix
