"""The story without a model: two plain processes move Llama-8B-shaped KV, and every byte is compared."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Final, Literal

import msgspec

from vcache.demo.devices import Device, Devices
from vcache.demo.display import Display
from vcache.demo.figures import Bandwidth, DemoReport, EngineFigures, gb_per_s
from vcache.demo.pool import CHUNK_SIZE
from vcache.demo.processes import Child, Stage
from vcache.demo.specs import TOKEN_BYTES, Move, MoveOutcome, WorkerSpec
from vcache.demo.story import OnStage, Scene, source_of
from vcache.errors import ConfigError

WORKER_TIMEOUT_S: Final = 300.0
ROUNDS: Final = 5
PROMPT: Final = 0
OTHERS: Final = 1


def run_plain(stage: Stage, display: Display, devices: Devices, tokens: int) -> DemoReport:
    """Raises ``ChildFailed`` when a process does not do its part, ``ConfigError`` for fewer tokens than a chunk has."""
    chunks = tokens // CHUNK_SIZE
    if not chunks:
        raise ConfigError(f"--tokens = {tokens}: at least one chunk of {CHUNK_SIZE} tokens is needed")
    whole = chunks * CHUNK_SIZE
    display.note(f"{chunks} chunks of {CHUNK_SIZE} tokens, {whole * TOKEN_BYTES / 2**20:.0f} MiB of Llama-8B-shaped KV")
    scene = Scene(stage, display, devices, chunks=chunks, chunk_bytes=CHUNK_SIZE * TOKEN_BYTES)
    with display.step(f"starting two workers, A on {devices.first.name} and B on {devices.second.name}") as on_stage:
        environment = scene.config.environment()
        first = PlainWorker(stage, "worker A", devices.first, whole, environment, task="store")
        second = PlainWorker(stage, "worker B", devices.second, whole, environment, task="retrieve")
        first.await_ready(on_stage)
        second.await_ready(on_stage)
    return DemoReport.of(scene.play(first, second), prompt_tokens=whole, loadable=whole, chunk_size=CHUNK_SIZE)


class PlainWorker:
    """The parent's side of one worker; it starts when this is made. ``task``: what it does with the prompt."""

    def __init__(
        self,
        stage: Stage,
        name: str,
        device: Device,
        tokens: int,
        environment: Mapping[str, str],
        *,
        task: Literal["store", "retrieve"],
    ) -> None:
        self.name = name
        self._device = device
        self._tokens = tokens
        self._task = task
        path = stage.directory / f"{name.replace(' ', '-')}.json"
        path.write_bytes(msgspec.json.encode(WorkerSpec(device=device.name, tokens=tokens, seed=ord(name[-1]))))
        self.child: Child = stage.start(name, "vcache.demo.kv_worker", str(path), environment=environment)

    def await_ready(self, on_stage: OnStage) -> None:
        """Waits until it can move KV."""
        self.child.result(timeout_s=WORKER_TIMEOUT_S, on_stage=on_stage)

    def answer(self, on_stage: OnStage) -> EngineFigures:
        outcome = self._move(Move(task=self._task, prompt=PROMPT, tokens=self._tokens, rounds=ROUNDS), on_stage)
        stores, moved = self._task == "store", outcome.moved
        loaded = 0 if stores else outcome.tokens
        return EngineFigures(
            name=self.name,
            device=self._device.name,
            tokens_computed=self._tokens - loaded,
            tokens_loaded=loaded,
            identical=outcome.tokens == self._tokens and not outcome.wrong_bytes,
            source=source_of(moved),
            bytes_loaded=sum(moved.read_bytes.values()),
            load_s=0.0 if stores else median(outcome.seconds),
            bytes_stored=moved.written_bytes,
            store_s=median(outcome.seconds) if stores else 0.0,
            bandwidth=_bandwidth(outcome, self._tokens * TOKEN_BYTES),
        )

    def store_others(self, chunks: int, on_stage: OnStage) -> None:
        self._move(Move(task="store", prompt=OTHERS, tokens=chunks * CHUNK_SIZE, rounds=1), on_stage)

    def _move(self, move: Move, on_stage: OnStage) -> MoveOutcome:
        result = self.child.ask(move, timeout_s=WORKER_TIMEOUT_S, on_stage=on_stage)
        return msgspec.convert(result, MoveOutcome)


def _bandwidth(outcome: MoveOutcome, nbytes: int) -> Bandwidth:
    pairs = list(zip(outcome.seconds, outcome.copy_seconds, strict=True))
    return Bandwidth(
        gb_s=gb_per_s(nbytes, median(outcome.seconds)),
        copy_gb_s=gb_per_s(nbytes, median(outcome.copy_seconds)),
        ratio=median(copy / ours for ours, copy in pairs),
        threads=outcome.threads,
        rounds=len(pairs),
    )
