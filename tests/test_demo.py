"""``vcache demo`` as a user runs it: its verdict, its figures, and that nothing stays behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support.processes import Processes
from vcache.demo.figures import DemoReport, EngineFigures
from vcache.demo.prompt import RESERVED_IDS, VOCABULARY, read_prompt, token_ids
from vcache.errors import ConfigError

MIB = 1 << 20
PATIENCE_S = 280.0
GOLDEN = [1862, 3844, 4014, 4054, 1724, 1554]


def test_plain_workers_share_kv_and_the_figures_say_so(processes: Processes, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    demo = processes.python("-m", "vcache.cli", "demo", "--no-llm", "--tokens", "600", "--json", str(figures))
    assert demo.wait(PATIENCE_S) == 0, demo.report()
    report = json.loads(figures.read_text())
    first, second = report["engines"]
    assert report["identical"] is True
    assert (first["tokens_computed"], first["tokens_loaded"]) == (512, 0)
    assert (second["tokens_computed"], second["tokens_loaded"]) == (0, 512)
    assert (first["bytes_stored"], second["bytes_loaded"]) == (64 * MIB, 64 * MIB)
    assert second["source"].startswith(("cpu:0", "GPU-"))
    assert report["store"]["ratio"] > 0
    assert report["retrieve"]["ratio"] > 0
    assert left_behind(demo.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(processes: Processes, number: signal.Signals) -> None:
    # Where these tests run in the background, SIGINT is ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import vcache.cli; vcache.cli.main()"
    )
    demo = processes.python("-c", code, "demo", "--no-llm", "--tokens", "1024")
    demo.expect("worker A on", PATIENCE_S)
    assert left_behind(demo.pid) != []
    demo.popen.send_signal(number)
    assert demo.wait() != 0
    assert left_behind(demo.pid) == []


def test_what_a_child_printed_is_shown_when_it_fails(processes: Processes, tmp_path: Path) -> None:
    demo = processes.python("-m", "vcache.cli", "demo", "--no-llm", "--tokens", str(1 << 26))  # 8 TiB
    assert demo.wait(PATIENCE_S) == 1
    assert "donor" in demo.log.read_text()
    assert left_behind(demo.pid) == []


@pytest.mark.slow
@pytest.mark.vllm
def test_two_vllm_engines_share_a_text(processes: Processes, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    demo = processes.python("-m", "vcache.cli", "demo", "--json", str(figures))
    assert demo.wait(PATIENCE_S) == 0, demo.report()
    report = json.loads(figures.read_text())
    first, second = report["engines"]
    assert report["identical"] is True
    assert first["tokens_loaded"] == 0
    assert second["tokens_loaded"] == 2560
    assert first["tokens"] == second["tokens"] == report["reference"]["tokens"]
    assert left_behind(demo.pid) == []


@pytest.mark.parametrize(
    ("identical", "loaded", "passed"), [(True, 256, True), (True, 0, False), (False, 256, False), (False, 0, False)]
)
def test_the_demo_passes_only_when_tokens_are_identical_and_something_was_loaded(
    identical: bool, loaded: int, passed: bool
) -> None:
    engine = EngineFigures(name="B", device="cpu:1", tokens_computed=1, tokens_loaded=loaded, ttft_s=0.1)
    report = DemoReport(identical=identical, engines=[engine], prompt_tokens=257, chunk_size=256)
    assert report.passed is passed


def test_a_text_is_the_same_ids_everywhere() -> None:
    assert token_ids("The keeper, the weir.") == GOLDEN
    ids = read_prompt(None)
    assert len(ids) > 2000
    assert min(ids) >= RESERVED_IDS
    assert max(ids) < VOCABULARY


def test_a_prompt_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt = .*nowhere\.txt"):
        read_prompt(tmp_path / "nowhere.txt")


def left_behind(pid: int) -> list[str]:
    """Directories of the demo that ``pid`` was, and processes that were told of one."""
    name = f"vcache-demo-{pid}-"
    found = [str(path) for path in Path("/dev/shm").glob(f"{name}*")]
    for entry in Path("/proc").iterdir():
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes() if entry.name.isdigit() else b""
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
        if name.encode() in told:
            found.append(f"process {entry.name}")
    return found
