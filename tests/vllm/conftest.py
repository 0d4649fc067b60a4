"""A real vLLM with and without VCache, as children of the tests; pools of two host devices for them.

An engine takes 12 s to start on a quiet machine, so most tests of this package share three of them (``trio``): one without VCache
and two that meet in a pool. Each test there has a part of the text of its own, so that none finds what another left.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from tests.support.processes import Child, Processes, host_directory
from tests.vllm.serving import ANSWER, Options
from vcache.config import VCacheConfig
from vcache.demo.prompt import read_prompt
from vcache.errors import UnavailableError
from vcache.protocol import ServerStats
from vcache.server_query import fetch_stats

CHUNK_SIZE = 256
#: Many times what anything takes where nothing else runs.
PATIENCE_S = 600.0
#: So that a miss means what the test is about, not that the machine was busy for a second.
PATIENT = {"call_timeout": "30s", "connect_timeout": "30s", "lease": "60s"}
# Words of a segment's header and of a record (docs/segment-format.md).
DIRECTORY_WORD, RECORDS_WORD, DATA_WORD = 6, 7, 8
RECORD_WORDS, GENERATION_WORD = 16, 15


class Answer:
    """What a generate gave: tokens per prompt, and vLLM's count of where the prompts' tokens came from."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.tokens: list[list[int]] = values["tokens"]
        self.computed: int = values["sources"]["local_compute"]
        self.cached: int = values["sources"]["local_cache_hit"]
        self.loaded: int = values["sources"]["external_kv_transfer"]


class Engine:
    """A vLLM engine in a child process. Starting takes a while: start several, then use them."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._ready = False

    def tell(self, command: str, **arguments: Any) -> None:
        if not self._ready:
            self._answer()
            self._ready = True
        self.child.tell(json.dumps({"do": command, **arguments}))

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.tell(command, **arguments)
        return self._answer()

    def generate(self, *prompts: list[int], max_tokens: int = 24, salt: str | None = None) -> Answer:
        return Answer(self.ask("generate", prompts=prompts, max_tokens=max_tokens, salt=salt))

    def answer(self) -> Answer:
        """The answer to a ``tell("generate", ...)``."""
        return Answer(self._answer())

    def forget(self) -> None:
        """Empties vLLM's own prefix cache."""
        assert self.ask("forget") == {"done": True}

    def stop(self) -> None:
        """Lets it end by itself, as an engine does on shutdown."""
        assert self.child.popen.stdin is not None
        self.child.popen.stdin.close()
        assert self.child.wait() == 0

    def _answer(self) -> dict[str, Any]:
        line = self.child.expect(ANSWER, PATIENCE_S)
        values: dict[str, Any] = json.loads(line[line.index(ANSWER) + len(ANSWER) :])
        return values


class Host:
    """A runtime directory, what serves in it, and the engines that use it."""

    def __init__(self, runtime_dir: Path, processes: Processes, model: Path, files: Path) -> None:
        self.config = VCacheConfig(runtime_dir=str(runtime_dir), server={"liveness_timeout": "60s"})
        self.processes = processes
        self.model = model
        self._files = files
        self._engines = itertools.count()
        self.server: Child | None = None
        self.donors: list[Child] = []

    def engine(
        self,
        device: str | None = None,
        connector: dict[str, Any] | None = None,
        model: Path | None = None,
        **options: Any,
    ) -> Engine:
        """Starts an engine. ``device`` gives it VCache, with further options of the connector; else it is vLLM alone."""
        if device is not None:
            runtime_dir = self.config.runtime_dir
            connector = {"runtime_dir": runtime_dir, "device": device, "client": PATIENT, **(connector or {})}
        path = self._files / f"engine-{next(self._engines)}.json"
        path.write_bytes(msgspec.json.encode(Options(model=str(model or self.model), connector=connector, **options)))
        return Engine(self.processes.python("-m", "tests.vllm.serving", str(path), config=self.config))

    def start_pool(self) -> None:
        """A server and a stand-alone donor on each of two host devices."""
        self.server = self.processes.server(self.config)
        self.start_donors()

    def start_donors(self) -> None:
        self.donors = [
            self.processes.python(
                "-m", "vcache.cli", "donate", "--device", device, "--size", "64MiB", config=self.config
            )
            for device in ("cpu:0", "cpu:1")
        ]
        self.await_pool(lambda stats: [segment.state for segment in stats.segments].count("serving") == 2)

    def restart_server(self) -> None:
        """Kills the server and starts another, which learns from the donors what there is."""
        assert self.server is not None
        self.server.kill()
        self.server = self.processes.server(self.config)
        self.await_pool(lambda stats: [segment.state for segment in stats.segments].count("serving") == 2)

    def await_pool(self, condition: Callable[[ServerStats], bool]) -> None:
        """Waits until the server's state is as it should be. Polled: it is another process's."""
        deadline = time.monotonic() + PATIENCE_S
        stats: ServerStats | None = None
        while time.monotonic() < deadline:
            with contextlib.suppress(UnavailableError):
                stats = fetch_stats(self.config, timeout_s=5)
                if condition(stats):
                    return
            time.sleep(0.02)
        reports = "\n".join(child.report() for child in self.donors)
        raise AssertionError(f"the pool never got there: {stats}\n{reports}")

    def entries(self) -> int:
        return fetch_stats(self.config, timeout_s=30).entries

    def zero_payloads(self) -> None:
        """Overwrites the bytes of everything stored; records stay as they are."""
        for words in self._segments():
            words[int(words[DATA_WORD]) // 8 :] = 0

    def retire_records(self) -> None:
        """Retires every record in memory, as a donor does before it gives the extent to another writer."""
        for words in self._segments():
            first = int(words[DIRECTORY_WORD]) // 8
            rows = words[first : first + int(words[RECORDS_WORD]) * RECORD_WORDS].reshape(-1, RECORD_WORDS)
            rows[:, GENERATION_WORD] = 0

    def _segments(self) -> list[np.memmap[Any, Any]]:
        files = list(self.config.runtime_path.glob("segment-*.shm"))
        assert len(files) == 2
        return [np.memmap(file, dtype=np.uint64, mode="r+") for file in files]


@contextlib.contextmanager
def a_host(model: Path, files: Path) -> Iterator[Host]:
    """A host of its own, and nothing of it left afterwards."""
    with host_directory() as directory:
        processes = Processes(files)
        try:
            yield Host(directory, processes, model, files)
        finally:
            processes.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's Llama with seeded random weights."""
    path = tmp_path_factory.mktemp("model") / "llama"
    build(
        path, f"from pathlib import Path; from vcache.demo.model import build_model; build_model(Path({str(path)!r}))"
    )
    return path


def build(path: Path, code: str) -> None:
    """Runs ``code`` in a child, so that the tests' own process stays small."""
    children = Processes(path.parent)
    try:
        assert children.python("-c", code).wait(PATIENCE_S) == 0, children.children[0].report()
    finally:
        children.close()


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """2,725 tokens of text."""
    return read_prompt(None)


@pytest.fixture
def host(model: Path, tmp_path: Path) -> Iterator[Host]:
    """A host for one test, with nothing on it yet."""
    with a_host(model, tmp_path) as host:
        yield host


class Trio(NamedTuple):
    """vLLM alone, and two engines that share a pool."""

    alone: Engine
    first: Engine
    second: Engine
    host: Host


@pytest.fixture(scope="package")
def trio(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Three engines shared by the tests of this package. Prefills go in steps of 512 tokens; float32, so that no rounding
    decides between tokens where the engines compute in different shapes."""
    with a_host(model, tmp_path_factory.mktemp("trio")) as host:
        host.start_pool()
        options: dict[str, Any] = {"dtype": "float32", "step_tokens": 512}
        alone = host.engine(**options)
        first = host.engine("cpu:0", events=True, **options)
        second = host.engine("cpu:1", **options)
        yield Trio(alone, first, second, host)
