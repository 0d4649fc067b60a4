"""A pool for the engine's tests: a real metadata server and stand-alone donors, each a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


@pytest.fixture
def start_donor(processes: Processes) -> Callable[..., Child]:
    """Starts a stand-alone donor; returns once its segment serves."""

    def start(config: VCacheConfig, size: str = "4MiB", device: str = "cpu:0") -> Child:
        before = serving_segments(config)
        child = processes.python("-m", "vcache.cli", "donate", "--device", device, "--size", size, config=config)
        eventually(lambda: serving_segments(config) > before, f"a donor's segment\n{child.report()}")
        return child

    return start


@pytest.fixture
def start_worker(processes: Processes) -> Callable[..., Worker]:
    """Starts a worker process; returns once its engine is there."""

    def start(config: VCacheConfig, **arguments: Any) -> Worker:
        worker = Worker(processes.python("-m", "tests.engine.worker", json.dumps(arguments), config=config))
        assert json.loads(worker.child.line())["ready"], worker.child.report()
        return worker

    return start


@pytest.fixture
def pool(config: VCacheConfig, server: Child, start_donor: Callable[..., Child]) -> VCacheConfig:
    """A server and one donor."""
    start_donor(config)
    return config


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
