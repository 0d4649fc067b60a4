"""What is written of results: JSON as promised, a table, plots; and when a bar counts as met."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import Bar, Better, Result, compare, judge
from benchmarks.plots import draw
from benchmarks.report import as_markdown, write_json
from tests.pool.payloads import until

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {"copy_": [10.0, 10.0, 10.0], "VCache": [9.2, 9.2, 9.1], "peer": [2.0, 2.0, 2.0]}


def test_ratios_are_paired_and_judged():
    bars = {"VCache": Bar(0.9, Better.HIGHER)}
    first, second, third = compare("pool", "case", FIGURES, unit="GB/s", against="copy_", bars=bars)
    assert (first.ratio, first.met) == (None, None)
    assert (second.ratio, second.against, second.met) == (pytest.approx(0.92), "copy_", True)
    assert (third.ratio, third.met) == (pytest.approx(0.2), None)
    beside_peer = judge("pool", "case", FIGURES, "VCache", unit="GB/s", against="peer", bar=Bar(5, Better.HIGHER))
    assert beside_peer.ratio == pytest.approx(4.6)
    assert beside_peer.met is False


@pytest.mark.parametrize(("ratio", "high", "met"), [(0.95, 0.97, True), (0.87, 0.91, True), (0.87, 0.89, False), (0.8, 1.2, False)])  # fmt: skip
def test_a_bar_is_met_when_the_better_end_reaches_it_and_the_median_is_near(ratio, high, met):
    bar = Bar(0.9, Better.HIGHER)
    assert Result("b", "c", "w", 1.0, 0.0, "x", ratio, "y", 0.5, high, bar).met is met


def test_json_has_the_promised_fields(tmp_path):
    write_json(compare("pool", "case", FIGURES, unit="GB/s", against="copy_"), tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"]["cores"] > 0
    assert "torch" in written["versions"]
    promised = {"benchmark", "case", "contestant", "median", "spread", "unit", "ratio", "against", "bar", "met"}
    assert all(promised <= set(row) for row in written["results"])
    assert written["results"][0]["bar"] is None


def test_markdown_has_a_row_a_result():
    results = compare("pool", "case", FIGURES, unit="GB/s", against="copy_")
    assert as_markdown(results).count("\n") == 2 + len(results)


def test_a_plot_is_drawn_for_each_benchmark(tmp_path):
    points = [
        Result("replay: hit rate", f"{size}", "lru", 30.0, 1.0, "%", panel="trace", size=size, size_unit="chunks")
        for size in (64, 128)
    ]
    bars = compare("pool: store", "case", FIGURES, unit="GB/s", against="copy_")
    written = draw([*bars, *points], tmp_path / "plots")
    assert [path.name for path in written] == ["pool.png", "replay.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "unknown benchmark 'nonsense'"),
        (["pool", "some.jsonl"], "unknown benchmark 'some.jsonl'"),
        (["replay", "absent.jsonl"], "no such trace: absent.jsonl"),
        (["copies", "--json", "/absent/bench.json"], "/absent/bench.json cannot be written"),
        (["--trace", "absent.jsonl"], "no such trace"),
    ],
)
def test_bad_usage_says_what_there_is(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_one_benchmark_runs_from_the_command_line_and_writes_all_it_is_asked_for(tmp_path):
    trace = tmp_path / "mine.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [1, 2]}\n{"timestamp": 9, "hash_ids": [1, 2, 3]}\n')
    files = ["--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md")]
    command = [sys.executable, "-m", "benchmarks", "replay", str(trace), "--quick", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "measuring replay" in done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [row["median"] for row in rows if row["contestant"] == "infinite cache"] == [pytest.approx(40)] * 2
    assert "replay: hit rate" in (tmp_path / "b.md").read_text()


def commands_below(pid: int) -> list[str]:
    """The command lines of a process's descendants."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
        return commands + [command for child in children for command in commands_below(int(child))]
    return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_leaves_nothing(processes, number):
    """No process and no shared memory: the fixtures see to it."""
    bench = processes.python("-m", "benchmarks", "server", "--quick")
    until(
        lambda: any("vram_metadata_server" in command for command in commands_below(bench.pid)), "it measures a server"
    )
    bench.popen.send_signal(number)
    assert bench.wait() == 128 + signal.SIGINT
    assert "vcache bench: interrupted" in bench.report()
