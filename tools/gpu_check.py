"""Proves the CUDA paths on the machine at hand: ``make gpu-check``, or ``python tools/gpu_check.py`` in a bare checkout.

Needs torch with CUDA, Triton, cuda-bindings, a C compiler and the packages of ``NEEDED``; no network and no installation. Each step runs
in processes of its own, so that a fault of the device ends those and no others, and for a limited time. What was found is written
after each step, whatever becomes of the next. Exit status: 0 all passed, 1 one failed, 2 the command line is wrong, 3 there is no
CUDA device, or something it needs is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

ROOT: Final = Path(__file__).resolve().parents[1]
#: By the names they are imported by.
NEEDED: Final = (
    "cuda.bindings", "hypothesis", "msgspec", "numpy", "pydantic", "pydantic_settings", "pytest", "pytest_timeout", "rich", "torch",
    "triton", "typer", "xxhash", "yaml", "zmq",
)  # fmt: skip
#: Where tests that need a CUDA device are.
TESTS: Final = (
    "tests/memory", "tests/pool", "tests/engine", "tests/transfer", "tests/remote", "tests/test_cli_doctor.py",
)  # fmt: skip
#: The kinds of handles to VRAM.
HANDLES: Final = ("vmm", "ipc")
#: They look at the memory of the whole device.
ALONE: Final = ("tests/engine/test_device_faults.py", "tests/memory/test_beside_torch.py")
FILES_AT_ONCE: Final = 4
#: A test that takes so long says where each of its threads is, also where one waits for the device for ever.
STUCK: Final = ("-o", "faulthandler_timeout=150")
#: What runs under each of compute-sanitizer's tools: the kernels that copy, and those of records. Nothing that expects a launch not
#: to wait, which under a sanitizer it may.
COPIES: Final = "tests/transfer/test_cuda_copies.py::test_round_trip_over_random_layouts"
RECORDS: Final = "tests/pool/test_copies_by_kernels.py::test_what_was_stored_is_loaded"
SANITIZED: Final = {"memcheck": (COPIES, RECORDS), "racecheck": (COPIES,)}
#: What each may take, in seconds; far more than it should. Together they should take about ten minutes.
STEPS: Final = {"doctor": 60, "tests": 480, "processes": 60, "demo": 120, "bandwidth": 300, "sanitizer": 300}
PREPARING_S: Final = 120
#: Of the output of what failed: how much of its end is kept.
KEPT_CHARS: Final = 20_000
EXIT_FAILED, EXIT_MISSING = 1, 3
TOO_LONG: Final = 124
#: What was interrupted for taking too long may clean up, and say where it was, for so many seconds.
LAST_WORDS_S: Final = 15


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    step: str
    case: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Done:
    """A process that has ended, or was ended for taking too long."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or [""])[-1][:200]


@dataclass
class Found:
    """What there is to tell: the rows, the benchmark's figures, and the output of what failed."""

    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    figures: Any = None
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]


class Check:
    """The steps; what they write lies in ``directory``."""

    def __init__(self, directory: Path, found: Found, *, quick: bool) -> None:
        self._directory = directory
        self._found = found
        self._quick = quick
        self._deadline = 0.0

    def step(self, name: str) -> Iterator[Row]:
        """The rows of a step, as they come; the last says how long it took."""
        begin = time.monotonic()
        self._deadline = begin + STEPS[name]
        yield from getattr(self, name)()
        seconds = time.monotonic() - begin
        yield Row(name, "time", seconds <= STEPS[name], f"{seconds:.0f} s, at most {STEPS[name]}")

    def doctor(self) -> Iterator[Row]:
        """What ``vcache doctor`` says of the GPUs; there is no pool yet, and that is no fault."""
        done = self._run("-m", "vcache.cli", "doctor", "--json", "--timeout", "0.1")
        try:  # whatever was said beside it
            findings, _ = json.JSONDecoder().raw_decode(done.output, done.output.index("[\n"))
        except ValueError:
            yield Row("doctor", "vcache doctor", passed=False, detail=done.last_line)
            return
        for finding in findings:
            if finding["about"] not in ("metadata server", "segments"):
                yield Row("doctor", finding["about"], finding["state"] != "problem", finding["detail"])

    def tests(self) -> Iterator[Row]:
        """The tests that need a GPU, a process for each file, a few at a time."""
        options = ["-m", "cuda"]
        if find_spec("mooncake") is None:  # other hosts are read through it
            options += ["-k", "not mooncake", "--ignore=tests/remote"]
        places = [place for place in TESTS if f"--ignore={place}" not in options]
        listed = self._run("-m", "pytest", "--collect-only", "-q", *options, *places)
        files = sorted({line.partition("::")[0] for line in listed.output.splitlines() if ".py::" in line})
        if listed.status or not files:
            yield Row("tests", "collection", passed=False, detail=listed.last_line)
        beside_others = [file for file in files if file not in ALONE]
        with ThreadPoolExecutor(max(1, min(FILES_AT_ONCE, (os.cpu_count() or 1) // 4))) as threads:
            for rows in threads.map(partial(self._tests_of, options), beside_others):
                yield from rows
        for file in files:
            if file in ALONE:
                yield from self._tests_of(options, file)

    def _tests_of(self, options: Sequence[str], file: str) -> list[Row]:
        report = self._directory / f"{file.replace('/', '.')}.xml"
        done = self._run("-m", "pytest", "-q", *STUCK, *options, f"--junitxml={report}", file)
        rows = []
        with contextlib.suppress(FileNotFoundError, ET.ParseError):  # it did not come to write it, or to its end
            for case in ET.parse(report).iter("testcase"):
                bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
                message = " ".join(str(bad[0].get("message")).split())[:200] if bad else ""  # on one line
                detail = message or f"{float(case.get('time', 0)):.1f} s"
                rows.append(Row("tests", f"{Path(file).stem}: {case.get('name')}", not bad, detail))
        if not rows or (done.status and all(row.passed for row in rows)):  # a fault of its process, or too long
            rows.append(Row("tests", file, passed=False, detail=f"status {done.status}: {done.last_line}"))
        return rows

    def processes(self) -> Iterator[Row]:
        """A process stores from a GPU into its own segment, another loads from it; every byte is compared. By each kind of handle."""
        for kind in HANDLES:
            done = self._run("tests/test_cross_gpu_store_retrieve.py", extra={"VCACHE_SEGMENT__CUDA_HANDLES": kind})
            yield Row("processes", f"store in one, load in another, by {kind}", done.status == 0, done.last_line)

    def demo(self) -> Iterator[Row]:
        done = self._run("-m", "vcache.cli", "demo", "--no-llm")
        yield Row("demo", "vcache demo --no-llm", done.status == 0, done.last_line)

    def bandwidth(self) -> Iterator[Row]:
        """``vcache bench gpu``: a row for each figure, failed where a bar was missed."""
        report = self._directory / "bandwidth.json"
        done = self._run("-m", "benchmarks", "gpu", "--json", str(report), *(["--quick"] if self._quick else []))
        if not report.exists():
            yield Row("bandwidth", "vcache bench gpu", passed=False, detail=done.last_line)
            return
        self._found.figures = json.loads(report.read_text())
        for figure in self._found.figures["results"]:
            detail = f"{figure['median']:.4g} {figure['unit']}"
            if figure["ratio"] is not None:
                detail += f", {figure['ratio']:.3g} of {figure['against']}" + (
                    f", bar {figure['bar']}" if figure["bar"] else ""
                )
            case = f"{figure['benchmark']}: {figure['case']}, {figure['contestant']}"
            yield Row("bandwidth", case, figure["met"] is not False, detail)

    def sanitizer(self) -> Iterator[Row]:
        """The copies under compute-sanitizer, where it is installed."""
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if program is None:
            yield Row("sanitizer", "compute-sanitizer", passed=True, detail="not installed here: nothing was checked")
            return
        for tool, tests in SANITIZED.items():
            command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            if tool == "memcheck":  # it would count that newer bindings ask an older driver for functions it has not
                command += ["--report-api-errors", "no"]
            done = self._run("-m", "pytest", "-q", "-m", "cuda", *tests, before=command)
            yield Row("sanitizer", tool, done.status == 0, done.last_line)

    def _run(self, *arguments: str, before: Sequence[str] = (), extra: Mapping[str, str] | None = None) -> Done:
        """As ``run``, in what is left of the step's time; the end of what a failure said is kept."""
        done = run(*arguments, before=before, extra=extra, limit_s=self._deadline - time.monotonic())
        if done.status:
            said = [*(f"{name}={value}" for name, value in (extra or {}).items()), *before, *arguments]
            self._found.outputs[" ".join(said)] = done.output[-KEPT_CHARS:]
        return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"which to run: {', '.join(STEPS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--quick", action="store_true", help="few rounds of the bandwidth step")
    options = parser.parse_args(arguments)
    if unknown := [step for step in options.steps if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; there are: {', '.join(STEPS)}")
    if missing := what_is_missing():
        print(f"gpu-check: {missing}", file=sys.stderr)
        return EXIT_MISSING
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in a script's background it is ignored, also by what is run
    found = Found(machine())
    with tempfile.TemporaryDirectory(prefix="vcache-gpu-check-") as directory:
        check = Check(Path(directory), found, quick=options.quick)
        for step in options.steps or STEPS:
            for row in check.step(step):
                found.rows.append(row)
                print(f"{'passed' if row.passed else 'FAILED'}  {row.step:10} {row.case}  {row.detail}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
            if options.markdown:
                options.markdown.write_text(as_markdown(found.rows))
    show(found.rows)
    for row in found.failed:
        print(f"FAILED  {row.step:10} {row.case}  {row.detail}")
    print(f"{len(found.rows) - len(found.failed)} passed, {len(found.failed)} failed")
    return EXIT_FAILED if found.failed else 0


def what_is_missing() -> str:
    """Why nothing can be checked here; empty if it can."""
    if absent := [name for name in NEEDED if not _is_there(name)]:
        return f"these packages are missing: {', '.join(absent)}"
    done = run("-c", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)")
    if done.status or done.last_line == "0":
        return "torch sees no CUDA device here; `vcache doctor` says why"
    return functions_in_c()


def functions_in_c() -> str:
    """Builds them in this checkout, unless they are there. Why that fails; empty if they are there now."""
    if run("-c", "import vcache.pool.shared_index, vcache.transfer").status:
        built = run("setup.py", "build_ext", "--inplace")
        if built.status:
            return f"the functions in C cannot be built: {built.last_line}"
    return ""


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # the package around it is missing
        return False


def machine() -> dict[str, str]:
    """The GPU, its driver, the versions of what drives it, and the day."""
    code = (
        "import json, torch, triton, cuda.bindings; print(json.dumps({'gpu': torch.cuda.get_device_name(0), 'torch': torch.__version__, "
        "'cuda': torch.version.cuda, 'triton': triton.__version__, 'cuda-bindings': cuda.bindings.__version__}))"
    )
    said = run("-c", code).output
    found: dict[str, str] = json.JSONDecoder().raw_decode(said, said.index("{"))[0]
    return {**found, "driver": _driver_version(), "date": datetime.now(tz=UTC).date().isoformat()}


def _driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PREPARING_S, check=False)
    return done.stdout.strip().partition("\n")[0] or "unknown"


def as_markdown(rows: Sequence[Row]) -> str:
    lines = ["| step | case | result | |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.step, row.case, "passed" if row.passed else "**failed**", row.detail)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Row]) -> None:
    """One table: as wide as the terminal, in Markdown where there is none."""
    if not sys.stdout.isatty():
        print(as_markdown(rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("step", "case", "result", "")
    for row in rows:
        result = Text("passed", "green") if row.passed else Text("failed", "bold red")
        table.add_row(row.step, Text(row.case), result, Text(row.detail))
    Console().print(table)


def run(
    *arguments: str,
    before: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    limit_s: float = PREPARING_S,
) -> Done:
    """Runs this Python with ``arguments`` in the checkout, for at most so long; then it is interrupted, so that it ends what it started, and
    killed with what it left behind.

    ``before``: a command to run it under; ``extra``: variables of its environment.
    """
    if limit_s <= 0:
        return Done(TOO_LONG, "not begun: no time was left")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [*before, sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = TOO_LONG
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
        return Done(status, f"{said}\nnot done after {limit_s:.0f} s" if status == TOO_LONG else said)


if __name__ == "__main__":
    sys.exit(main())
