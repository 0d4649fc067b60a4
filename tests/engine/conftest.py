"""A pool for the engine's tests: a real metadata server and stand-alone donors, each a process of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import pytest
import torch

from tests.engine.kv import LAYERS, model_of, new_tensors
from tests.support.processes import PATIENCE_S, Child, Processes
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.server_query import fetch_stats

NUM_BLOCKS = 64


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Waits for what other processes bring about; fails the test when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def serving_segments(config: VCacheConfig) -> int:
    return sum(segment.state == "serving" for segment in fetch_stats(config, timeout_s=PATIENCE_S).segments)


class Worker:
    """A serving worker in a process of its own (``tests.engine.worker``)."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.child.tell(json.dumps({"do": do, **arguments}))
        answer: dict[str, Any] = json.loads(self.child.line())
        return answer

    def do_all(self, commands: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Gives all commands at once, then yields the answers as they come."""
        for command in commands:
            self.child.tell(json.dumps(command))
        for _ in commands:
            yield json.loads(self.child.line())


def donate(processes: Processes, config: VCacheConfig, size: str = "4MiB", device: str = "cpu:0") -> Child:
    """Starts a stand-alone donor; returns once its segment serves."""
    before = serving_segments(config)
    child = processes.python("-m", "vcache.cli", "donate", "--device", device, "--size", size, config=config)
    eventually(lambda: serving_segments(config) > before or not child.running, "a donor's segment")
    assert child.running, child.report()
    return child


@pytest.fixture
def start_donor(processes: Processes) -> Callable[..., Child]:
    """Starts a stand-alone donor (``size``, ``device``); returns once its segment serves."""
    return partial(donate, processes)


@pytest.fixture
def start_worker(processes: Processes) -> Callable[..., Worker]:
    """Starts a worker process; returns once its engine is there."""

    def start(config: VCacheConfig, **arguments: Any) -> Worker:
        worker = Worker(processes.python("-m", "tests.engine.worker", json.dumps(arguments), config=config))
        assert json.loads(worker.child.line())["ready"], worker.child.report()
        return worker

    return start


@pytest.fixture(scope="package")
def lasting_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], VCacheConfig]]:
    """A server and one donor, on a device, that serve all tests of this package which kill neither; a pool for each device."""
    with ExitStack() as stack:

        @cache
        def lasting(device: str) -> VCacheConfig:
            directory = tempfile.mkdtemp(prefix="vct-", dir="/dev/shm")
            stack.callback(shutil.rmtree, directory)
            processes = Processes(tmp_path_factory.mktemp("pool"))
            stack.callback(processes.close)
            config = VCacheConfig(runtime_dir=directory)
            processes.server(config)
            donate(processes, config, device=device)
            return config

        yield lasting


@pytest.fixture
def pool(request: pytest.FixtureRequest, lasting_pools: Callable[[str], VCacheConfig]) -> Iterator[VCacheConfig]:
    """A server and one donor, empty at the beginning of the test; on the ``device`` of tests that have one."""
    config = lasting_pools(request.getfixturevalue("device") if "device" in request.fixturenames else "cpu:0")
    yield config
    with VCacheEngine(config, model=model_of(), role="scheduler") as engine:
        engine.clear()
        assert engine.get_stats()["server_entries"] == 0


@pytest.fixture
def open_engine() -> Iterator[Callable[..., VCacheEngine]]:
    """Makes engines in this process; each is closed at the end."""
    with ExitStack() as stack:

        def open_(config: VCacheConfig, **arguments: Any) -> VCacheEngine:
            arguments.setdefault("model", model_of())
            return stack.enter_context(VCacheEngine(config, **arguments))

        yield open_


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Untouched KV tensors for the test's model, in host memory."""
    return new_tensors(NUM_BLOCKS, layers=LAYERS)
