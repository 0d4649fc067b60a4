"""A real vLLM with and without VCache, as children of the test; a pool of two host devices for them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.support.processes import Child, Processes
from tests.vllm.serving import ANSWER, Options
from vcache.config import VCacheConfig
from vcache.demo.prompt import read_prompt
from vcache.errors import UnavailableError
from vcache.server_query import fetch_stats

CHUNK_SIZE = 256
#: vLLM takes 10 s to start where nothing else runs.
START_PATIENCE_S = 200.0
#: So that a miss means what the test is about, not that the machine was busy for a second.
PATIENT = {"call_timeout": "30s", "connect_timeout": "30s", "lease": "60s"}
# Words of a segment's header and of a record (docs/segment-format.md).
DIRECTORY_WORD, RECORDS_WORD, DATA_WORD = 6, 7, 8
RECORD_WORDS, GENERATION_WORD = 16, 15


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's Llama with seeded random weights. Built in a child, so that the tests' own process stays small."""
    path = tmp_path_factory.mktemp("model")
    children = Processes(path)
    code = f"from pathlib import Path; from vcache.demo.model import build_model; build_model(Path({str(path / 'llama')!r}))"
    try:
        assert children.python("-c", code).wait() == 0
    finally:
        children.close()
    return path / "llama"


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """2,725 tokens of text."""
    return read_prompt(None)


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

    def stop(self) -> None:
        """Lets it end by itself, as an engine does on shutdown."""
        assert self.child.popen.stdin is not None
        self.child.popen.stdin.close()
        assert self.child.wait() == 0

    def _answer(self) -> dict[str, Any]:
        line = self.child.expect(ANSWER, START_PATIENCE_S)
        values: dict[str, Any] = json.loads(line[line.index(ANSWER) + len(ANSWER) :])
        return values


StartEngine = Callable[..., Engine]


@pytest.fixture
def start_engine(runtime_dir: Path, processes: Processes, model: Path, tmp_path: Path) -> StartEngine:
    """Starts an engine. ``device`` gives it VCache, with further options of the connector; else it is vLLM alone."""
    started = 0

    def start(device: str | None = None, connector: dict[str, Any] | None = None, **options: Any) -> Engine:
        nonlocal started
        started += 1
        if device is not None:
            connector = {"runtime_dir": str(runtime_dir), "device": device, "client": PATIENT, **(connector or {})}
        path = tmp_path / f"engine-{started}.json"
        path.write_bytes(msgspec.json.encode(Options(model=str(model), connector=connector, **options)))
        return Engine(processes.python("-m", "tests.vllm.serving", str(path)))

    return start


class Pool:
    """A server and a stand-alone donor on each of two host devices."""

    def __init__(self, config: VCacheConfig, processes: Processes) -> None:
        self.config = config
        self.server = processes.server(config)
        self.donors = [
            processes.python("-m", "vcache.cli", "donate", "--device", device, "--size", "64MiB", config=config)
            for device in ("cpu:0", "cpu:1")
        ]
        deadline = time.monotonic() + START_PATIENCE_S
        while not self._serving():
            assert time.monotonic() < deadline, "\n".join(donor.report() for donor in self.donors)
            time.sleep(0.05)  # polled: what is waited for is another process's state

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

    def _serving(self) -> bool:
        with contextlib.suppress(UnavailableError):
            segments = fetch_stats(self.config, timeout_s=0.5).segments
            return len(segments) == 2 and all(segment.state == "serving" for segment in segments)
        return False


@pytest.fixture
def pool(runtime_dir: Path, processes: Processes) -> Pool:
    return Pool(VCacheConfig(runtime_dir=str(runtime_dir), server={"liveness_timeout": "60s"}), processes)
