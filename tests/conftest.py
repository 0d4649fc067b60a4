"""Fixtures of all tests: a runtime directory of their own, child processes that are always ended, servers, devices."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.processes import Child, Processes, host_directory
from vcache.config import VCacheConfig

# The same examples in every run, so that nobody's change fails for what another one did. `make soak` looks for new ones.
settings.register_profile("main", derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("main")

# Where these are ignored (nohup, the background of a script), programs that tests start would inherit that. Handlers are not inherited.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Serving engines come first, since they take longest."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


@pytest.fixture(autouse=True)
def _only_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see none of the developer's settings, save the log level."""
    for variable in list(os.environ):
        if variable.startswith("VCACHE_") and variable != "VCACHE_LOG_LEVEL":
            monkeypatch.delenv(variable)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh, short directory in shared memory: the "host" of this test.

    ``VCACHE_RUNTIME_DIR`` names it, so that any ``VCacheConfig()`` of the test or its children is on this host. Removed
    afterwards; the test fails when a process still uses it then, or when the default directory came into being.
    """
    default = VCacheConfig().runtime_path
    existed = default.exists()
    with host_directory() as directory:
        monkeypatch.setenv("VCACHE_RUNTIME_DIR", str(directory))
        yield directory
    assert existed or not default.exists(), f"{default} came into being: something ignored its runtime_dir"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts child processes; whatever still runs at the end is killed with all it started."""
    children = Processes(tmp_path)
    yield children
    children.close()


@pytest.fixture
def config(runtime_dir: Path) -> VCacheConfig:
    """The default configuration on this test's host."""
    return VCacheConfig(runtime_dir=str(runtime_dir))


@pytest.fixture
def start_server(runtime_dir: Path, processes: Processes) -> Callable[..., tuple[VCacheConfig, Child]]:
    """Starts a real metadata server with settings of choice; returns its configuration and process once it answers."""

    def start(**settings: Any) -> tuple[VCacheConfig, Child]:
        config = VCacheConfig(runtime_dir=str(runtime_dir), **settings)
        return config, processes.server(config)

    return start


@pytest.fixture
def server(config: VCacheConfig, processes: Processes) -> Child:
    """A real metadata server with default settings on this test's host (see ``config``), ready to answer."""
    return processes.server(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 2 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount_point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "-l", str(mount_point)], check=True)


@pytest.fixture(params=["cpu:0", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a test once on host memory and once on a GPU; skipped with a reason where there is none."""
    name: str = request.param
    return name
