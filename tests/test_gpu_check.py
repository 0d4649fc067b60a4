"""What proves the CUDA paths, as far as a machine without a GPU can tell: it says what is missing, and its steps work on the host."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ONE_WAY, RETRIEVE, ROUND_TRIP, STORE, Sizes, run_on
from benchmarks.gpu_stages import COPY, KEYS, LAUNCH, SERVER, WHOLE
from benchmarks.measure import Effort
from tests.support.processes import PATIENCE_S, REPOSITORY, child_environment
from tools.gpu_check import (
    ALONE,
    EXIT_MISSING,
    SANITIZED,
    STEPS,
    TESTS,
    TOO_LONG,
    Check,
    Found,
    Row,
    as_markdown,
    main,
    run,
)

ON_A_GPU = torch.cuda.is_available()


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_check.py", *arguments]
    environment = child_environment()
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.skipif(ON_A_GPU, reason="there is a GPU here: run it")
def test_without_a_gpu_it_says_so_and_checks_nothing():
    done = gpu_check()
    assert done.returncode == EXIT_MISSING and not done.stdout
    assert "torch sees no CUDA device here" in done.stderr or "these packages are missing: cuda.bindings" in done.stderr
    bench = [sys.executable, "-m", "benchmarks", "gpu"]
    done = subprocess.run(bench, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "benchmark gpu: torch sees no CUDA device here" in done.stderr


def test_in_a_bare_checkout_the_functions_in_c_are_built_once(tmp_path):
    for name in ("vcache", "tools", "integration", "vram_metadata_server"):
        shutil.copytree(Path(REPOSITORY, name), tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(Path(REPOSITORY, name), tmp_path)
    code = "import sys; sys.path[:1] = ['tools']; import gpu_check; sys.exit(gpu_check.functions_in_c() or 0)"

    def built():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        return {path.name.partition(".")[0]: path.stat().st_mtime_ns for path in tmp_path.glob("vcache/*/*.so")}

    first = built()
    assert set(first) == {"_copy_blocks", "_shared_index"} and built() == first


def test_an_unknown_step_is_a_usage_error():
    done = gpu_check("kernals")
    assert done.returncode == 2 and "there are: doctor, tests" in done.stderr


def test_every_test_that_needs_a_gpu_is_among_those_it_runs():
    listing = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "cuda", "tests"]
    listed = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = {line.partition("::")[0] for line in listed.splitlines() if "::" in line}
    assert files and {file for file in files if not any(Path(file).is_relative_to(place) for place in TESTS)} == set()
    measuring = {file for file in files if "cuda.mem_get_info(" in Path(REPOSITORY, file).read_text()}
    assert measuring == set(ALONE), "these must have the device to themselves, and only these"


@pytest.mark.skipif(ON_A_GPU, reason="they would not be skipped")
def test_a_skipped_test_has_not_passed(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.gpu_check.TESTS", ("tests/transfer/test_cuda_copies.py",))
    *rows, took = Check(tmp_path, Found({}), quick=True).step("tests")
    assert len(rows) == 3 and not any(row.passed for row in rows)
    assert {row.detail for row in rows} == {"no CUDA device here"}
    assert took.passed and took.detail.endswith(f"s, at most {STEPS['tests']}")


def test_a_test_that_failed_says_why_and_a_process_that_ends_badly_has_failed_though_its_tests_passed(tmp_path):
    test = tmp_path / "test_that_ends_badly.py"
    test.write_text(
        "import atexit, os\ndef test_fine():\n    atexit.register(os._exit, 11)\n"
        "def test_bad():\n    assert [1, 2] == [3, 4], 'they\\ndiffer'\n"
    )
    check = Check(tmp_path, Found({}), quick=True)
    check._deadline = time.monotonic() + PATIENCE_S
    fine, bad = check._tests_of(["-p", "no:cacheprovider"], str(test))
    assert fine.passed and not bad.passed
    assert bad.detail.startswith("AssertionError: they differ assert [1, 2] == [3, 4]"), "on one line"
    fine, whole = check._tests_of(["-p", "no:cacheprovider", "-k", "fine"], str(test))
    assert fine.passed
    assert not whole.passed and whole.case == str(test) and whole.detail.startswith("status 11: ")


@pytest.mark.parametrize("tool", SANITIZED)
def test_what_runs_under_a_sanitizer_is_there(tool):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "cuda", *SANITIZED[tool]]
    done = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{len(SANITIZED[tool])} tests collected" in done.stdout.replace(
        "1 test ", "1 tests "
    )


def test_the_step_of_two_processes_works_on_host_devices(tmp_path):
    *rows, _ = Check(tmp_path, Found({}), quick=True).step("processes")
    assert [row.passed for row in rows] == [True, True], rows


def test_a_step_that_takes_too_long_is_ended_with_all_it_started_and_has_failed(tmp_path, monkeypatch):
    hangs = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '1000'])"
    done = run("-c", hangs, limit_s=2.0)
    assert done.status == TOO_LONG and done.output.startswith("begun\n") and done.last_line == "not done after 2 s"
    assert "KeyboardInterrupt" in done.output, "it says where it was"
    monkeypatch.setitem(STEPS, "demo", 0)
    found = Found({})
    row, took = Check(tmp_path, found, quick=True).step("demo")
    assert not row.passed and row.detail == "not begun: no time was left"
    assert not took.passed
    assert list(found.outputs) == ["-m vcache.cli demo --no-llm"]


def test_what_was_found_is_told_in_a_table_and_in_json_and_by_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.gpu_check.what_is_missing", lambda: "")
    monkeypatch.setattr("tools.gpu_check.machine", lambda: {"gpu": "none at all"})
    monkeypatch.setattr(Check, "demo", lambda self: iter([Row("demo", "a case", passed=True, detail="fine")]))
    monkeypatch.setattr(Check, "doctor", lambda self: iter([Row("doctor", "another", passed=False, detail="not fine")]))
    report = tmp_path / "found.json"
    assert main(["demo", "--json", str(report), "--markdown", str(tmp_path / "found.md")]) == 0
    assert main(["demo", "doctor", "--json", str(report)]) == 1
    said = capsys.readouterr().out
    assert "| doctor | another | **failed** | not fine |" in said
    assert said.endswith("3 passed, 1 failed\n")
    found = json.loads(report.read_text())
    assert found["machine"] == {"gpu": "none at all"}
    assert [row["case"] for row in found["rows"]] == ["a case", "time", "another", "time"]
    assert "| demo | a case | passed | fine |" in (tmp_path / "found.md").read_text()


def test_the_benchmark_of_a_gpu_runs_on_the_host():
    tiny = Sizes(chunk_mib=(1,), chunks=(1, 2), tokens=512, layers=1, rotation_bytes=4 << 20)
    results = list(run_on(torch.device("cpu", 0), Effort.QUICK, tiny))
    assert {result.benchmark for result in results} == {
        "gpu: store",
        "gpu: retrieve",
        "gpu: engine's store",
        "gpu: engine's retrieve",
        "gpu: where the time of a store goes",
        "gpu: where the time of a retrieve goes",
    }
    contestants = {result.contestant for result in results}
    assert contestants >= {STORE, RETRIEVE, ONE_WAY, ROUND_TRIP, KEYS, SERVER, LAUNCH, COPY, WHOLE}
    assert all(result.median > 0 for result in results if result.contestant not in (COPY, LAUNCH))


def test_the_table_says_what_failed():
    text = as_markdown([Row("tests", "one | two", passed=True), Row("demo", "three", passed=False, detail="why")])
    assert "| tests | one / two | passed |  |" in text and "| demo | three | **failed** | why |" in text
