"""The demo without a model: two plain processes move Llama-8B-shaped KV through the pool, and every byte is compared."""

from __future__ import annotations

from statistics import median
from typing import Final, Literal

import msgspec

from vcache.config import VCacheConfig
from vcache.demo.devices import Device
from vcache.demo.display import Display
from vcache.demo.figures import Bandwidth, DemoReport, EngineFigures, gb_per_s
from vcache.demo.pool import CHUNK_SIZE, demo_config, devices_in_use, server_stats, start_pool
from vcache.demo.processes import Stage
from vcache.demo.specs import TOKEN_BYTES, PlainOutcome, PlainSpec
from vcache.errors import ConfigError

WORKER_TIMEOUT_S: Final = 300.0
ROUNDS: Final = 5


def run_plain(stage: Stage, display: Display, devices: tuple[Device, Device], tokens: int) -> DemoReport:
    """Raises ``ChildFailed`` when a process does not do its part, ``ConfigError`` for fewer tokens than a chunk has."""
    whole = tokens // CHUNK_SIZE * CHUNK_SIZE
    if not whole:
        raise ConfigError(f"--tokens = {tokens}: at least one chunk of {CHUNK_SIZE} tokens is needed")
    config = demo_config(stage)
    nbytes = whole * TOKEN_BYTES
    display.note(f"{whole // CHUNK_SIZE} chunks of {CHUNK_SIZE} tokens, {nbytes / 2**20:.0f} MiB of Llama-8B-shaped KV")
    with display.step(f"starting a metadata server and donors on {devices[0].name} and {devices[1].name}"):
        start_pool(stage, config, devices, segment_bytes=nbytes + nbytes // 4 + (16 << 20))
    first = _run(stage, display, config, "worker A", "store", devices[0], whole)
    source = devices_in_use(server_stats(config))
    second = _run(stage, display, config, "worker B", "retrieve", devices[1], whole)
    return DemoReport(
        identical=first.tokens == second.tokens == whole and not first.wrong_bytes and not second.wrong_bytes,
        engines=[
            EngineFigures(
                name="worker A",
                device=devices[0].name,
                tokens_computed=whole,
                tokens_loaded=0,
                ttft_s=None,
                bytes_stored=nbytes,
                store_s=median(first.seconds),
            ),
            EngineFigures(
                name="worker B",
                device=devices[1].name,
                tokens_computed=whole - second.tokens,
                tokens_loaded=second.tokens,
                ttft_s=None,
                source=source if second.tokens else "",
                bytes_loaded=second.tokens * TOKEN_BYTES,
                load_s=median(second.seconds),
            ),
        ],
        prompt_tokens=whole,
        chunk_size=CHUNK_SIZE,
        store=_bandwidth(first),
        retrieve=_bandwidth(second),
    )


def _run(
    stage: Stage,
    display: Display,
    config: VCacheConfig,
    name: str,
    task: Literal["store", "retrieve"],
    device: Device,
    tokens: int,
) -> PlainOutcome:
    spec = PlainSpec(task=task, tokens=tokens, device=device.name, rounds=ROUNDS)
    path = stage.directory / f"{task}.json"
    path.write_bytes(msgspec.json.encode(spec))
    with display.step(f"{name} on {device.name}") as on_stage:
        child = stage.start(name, "vcache.demo.kv_worker", str(path), environment=config.environment())
        result = child.result(timeout_s=WORKER_TIMEOUT_S, on_stage=on_stage)
        stage.finished(child)
    return msgspec.convert(result, PlainOutcome)


def _bandwidth(outcome: PlainOutcome) -> Bandwidth:
    pairs = list(zip(outcome.seconds, outcome.copy_seconds, strict=True))
    return Bandwidth(
        gb_s=gb_per_s(outcome.nbytes, median(outcome.seconds)),
        copy_gb_s=gb_per_s(outcome.nbytes, median(outcome.copy_seconds)),
        ratio=median(copy / ours for ours, copy in pairs),
        threads=outcome.threads,
        rounds=len(pairs),
    )
