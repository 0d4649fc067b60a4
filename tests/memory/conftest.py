"""Processes with VRAM: of the GPUs that are here, or over a stand-in of the driver that is compiled for the tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import Child, Processes

STAND_IN = Path(__file__).with_name("stand_in_driver.c")


class Vram:
    """A process that has VRAM; see ``vram_process``."""

    def __init__(self, child: Child, log: Path) -> None:
        self.child = child
        self._log = log

    def ask(self, command: str) -> str:
        """What it says to a command."""
        self.child.tell(command)
        return self.child.line()

    def calls(self) -> list[str]:
        """The stand-in's log: the driver's functions that were called so far, in order."""
        return self._log.read_text().split("\n")[:-1] if self._log.exists() else []


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the stand-in is the driver."""
    directory = tmp_path_factory.mktemp("driver")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(directory / "libcuda.so.1"), str(STAND_IN), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": str(directory)}


@pytest.fixture(params=["stand-in", pytest.param("driver", marks=pytest.mark.cuda)])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of processes over the stand-in, and on machines that have it over the real driver."""
    found: dict[str, str] = request.getfixturevalue("stand_in") if request.param == "stand-in" else {}
    return found


@pytest.fixture
def start(processes: Processes, runtime_dir: Path, tmp_path: Path) -> Callable[..., Vram]:
    """Starts a process with VRAM in an environment, with settings of the stand-in (``fail="cuMemMap"``)."""

    def begin(environment: dict[str, str], **settings: str) -> Vram:
        log = tmp_path / f"calls-{len(processes.children)}"
        chosen = {f"STAND_IN_{name.upper()}": value for name, value in settings.items()}
        extra = {**environment, **chosen, "STAND_IN_LOG": str(log)}
        return Vram(processes.python("-m", "tests.memory.vram_process", str(runtime_dir), extra=extra), log)

    return begin
