"""``vcache demo`` as a user runs it: its verdict, its figures, and that nothing stays behind."""

from __future__ import annotations

import io
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.processes import Child, Processes
from vcache.demo.display import Display
from vcache.demo.figures import DemoReport, EngineFigures
from vcache.demo.processes import Stage
from vcache.demo.prompt import RESERVED_IDS, VOCABULARY, read_prompt, token_ids
from vcache.demo.run import run_demo
from vcache.errors import ConfigError

MIB = 1 << 20
PATIENCE_S = 280.0
#: Where engine B loads the prefix from, in this order.
PLACES = ["vram", "dram", "mooncake"]
GOLDEN = [1862, 3844, 4014, 4054, 1724, 1554]


def test_plain_workers_share_kv_from_every_place_and_the_figures_say_so(processes: Processes, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    demo = processes.python("-m", "vcache.cli", "demo", "--no-llm", "--tokens", "600", "--json", str(figures))
    assert demo.wait(PATIENCE_S) == 0, demo.report()
    report = json.loads(figures.read_text())
    first, *others = report["engines"]
    assert report["identical"] is True
    assert (first["tokens_computed"], first["tokens_loaded"], first["bytes_stored"]) == (512, 0, 64 * MIB)
    assert [engine["source"] for engine in others] == PLACES
    for engine in others:
        assert (engine["tokens_computed"], engine["tokens_loaded"], engine["bytes_loaded"]) == (0, 512, 64 * MIB)
    assert others[0]["source_device"].startswith(("cpu:0", "GPU-"))
    assert all(engine["bandwidth"]["ratio"] > 0 for engine in report["engines"])
    assert_nothing_left_behind(demo)


#: The demo on a machine with one GPU, here a host device, and without Mooncake.
ON_ONE_DEVICE = """
import sys
from pathlib import Path
sys.modules["mooncake"] = None
from vcache.demo import run
from vcache.demo.devices import Device, Devices
run.devices_here = lambda: Devices(Device("cpu:0", None), Device("cpu:0", None), Device("cpu:1", None))
sys.exit(run.run_demo(llm=False, tokens=256, json_file=Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_with_one_device_and_without_mooncake_it_is_the_same_story(processes: Processes, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    demo = processes.python("-c", ON_ONE_DEVICE, str(figures))
    assert demo.wait(PATIENCE_S) == 0, demo.report()
    engines = json.loads(figures.read_text())["engines"]
    assert [engine["source"] for engine in engines[1:]] == ["vram", "dram", "files"]
    assert_nothing_left_behind(demo)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing_behind(processes: Processes, number: signal.Signals) -> None:
    # Where these tests run in the background, SIGINT is ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import vcache.cli; vcache.cli.main()"
    )
    demo = processes.python("-c", code, "demo", "--no-llm", "--tokens", "1024")
    demo.expect("store, round 1", PATIENCE_S)
    assert left_behind(demo.pid) != []
    demo.popen.send_signal(number)
    assert demo.wait() != 0
    assert_nothing_left_behind(demo)


def test_what_a_killed_demo_left_is_removed_by_the_next_one(processes: Processes) -> None:
    stay = "import signal\nfrom vcache.demo.processes import Stage\nwith Stage() as stage:\n"
    stay += "    print(f'stage at {stage.directory}.', flush=True)\n    signal.pause()"
    killed, living = (processes.python("-c", stay) for _ in range(2))
    left, kept = (Path(child.expect("stage at").split()[-1].rstrip(".")) for child in (killed, living))
    killed.kill()
    assert left.is_dir()
    with Stage():
        assert not left.exists()
        assert kept.is_dir()
    living.kill()
    with Stage():
        assert not kept.exists()


def test_figures_that_cannot_be_written_are_refused_before_anything_starts(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "figures.json"):
        with pytest.raises(ConfigError, match=f"--json = {path}: cannot be written"):
            run_demo(llm=False, json_file=path)


@pytest.mark.slow
def test_a_text_is_refused_where_no_engine_would_read_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt = .*leave out --no-llm"):
        run_demo(llm=False, prompt=tmp_path / "text")


def test_what_a_child_printed_is_shown_when_it_fails(processes: Processes, tmp_path: Path) -> None:
    demo = processes.python("-m", "vcache.cli", "demo", "--no-llm", "--tokens", str(1 << 26))  # 8 TiB
    assert demo.wait(PATIENCE_S) == 1
    assert "donor" in demo.log.read_text()
    assert_nothing_left_behind(demo)


@pytest.mark.slow
@pytest.mark.vllm
def test_two_vllm_engines_share_a_text(processes: Processes, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    demo = processes.python("-m", "vcache.cli", "demo", "--json", str(figures))
    assert demo.wait(PATIENCE_S) == 0, demo.report()
    report = json.loads(figures.read_text())
    first, *others = report["engines"]
    assert report["identical"] is True
    assert first["tokens_loaded"] == 0
    assert [(engine["source"], engine["tokens_loaded"]) for engine in others] == [(place, 2560) for place in PLACES]
    assert all(engine["tokens"] == report["reference"]["tokens"] for engine in report["engines"])
    assert_nothing_left_behind(demo)


@pytest.mark.parametrize(
    ("wrong", "passed"),
    [
        ({}, True),
        ({"identical": False}, False),
        ({"tokens_loaded": 0, "source": ""}, False),
        ({"tokens_loaded": 256}, False),
        ({"source": "vram+mooncake"}, False),
        ({"source": "mooncake"}, False),
    ],
)
def test_the_demo_passes_only_when_all_is_identical_and_was_loaded_whole_from_where_it_should_be(
    wrong: dict[str, Any], passed: bool
) -> None:
    right: dict[str, Any] = {"identical": True, "tokens_loaded": 512, "expected": "vram", "source": "vram"}
    engines = [
        EngineFigures(name="A", device="cpu:0", tokens_computed=600, tokens_loaded=0, identical=True),
        EngineFigures(name="B", device="cpu:1", tokens_computed=88, **right | wrong),
    ]
    report = DemoReport.of(engines, prompt_tokens=600, loadable=512, chunk_size=256)
    assert report.passed is passed
    shown = Console(width=100, record=True, file=io.StringIO())
    Display(shown).report(report)
    assert ("not" in shown.export_text()) is not passed


def test_what_others_printed_is_quoted_as_it_is() -> None:
    shown = Console(width=100, record=True, file=io.StringIO())
    Display(shown).quote("[rank0] cannot read [/mnt/model]")
    assert shown.export_text() == "[rank0] cannot read [/mnt/model]\n"


def test_a_text_is_the_same_ids_everywhere() -> None:
    assert token_ids("The keeper, the weir.") == GOLDEN
    ids = read_prompt(None)
    assert len(ids) > 2000
    assert min(ids) >= RESERVED_IDS
    assert max(ids) < VOCABULARY


def test_a_prompt_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt = .*nowhere\.txt"):
        read_prompt(tmp_path / "nowhere.txt")


def assert_nothing_left_behind(demo: Child) -> None:
    """No directory the moment it ends; processes of processes that were killed may take a moment to follow them."""
    assert not list(Path("/dev/shm").glob(f"vcache-demo-{demo.pid}-*"))
    deadline = time.monotonic() + PATIENCE_S
    while left_behind(demo.pid):
        assert time.monotonic() < deadline, left_behind(demo.pid)
        time.sleep(0.05)


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
