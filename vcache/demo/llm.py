"""The main job: one real engine computes a prompt and stores it, a second loads it from the first one's segment.

Three runs of the same model on the same prompt, each a process of its own: without VCache (what must come out), engine A with
an empty pool, engine B beside it on the second device. Both of the latter have the same options, only the device differs.

The engines' steps end where the part of the prompt that B loads ends. So B computes the rest in the same shapes as the others
do, and its tokens are the same to the last bit: with other shapes bfloat16 sums round differently and a near tie between two
tokens may fall the other way, with VCache or without.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from vcache.config import VCacheConfig
from vcache.demo.devices import Device
from vcache.demo.display import Display
from vcache.demo.figures import DemoReport, EngineFigures
from vcache.demo.model import HEAD_SIZE, HEADS, LAYERS, MAX_TOKENS
from vcache.demo.pool import BLOCK_SIZE, CHUNK_SIZE, demo_config, devices_in_use, server_stats, start_pool
from vcache.demo.processes import Stage
from vcache.demo.specs import EngineOutcome, EngineSpec
from vcache.errors import ConfigError

ENGINE_TIMEOUT_S: Final = 300.0
GENERATED_TOKENS: Final = 48
_TOKEN_BYTES: Final = LAYERS * 2 * HEADS * HEAD_SIZE * 2


def run_llm(stage: Stage, display: Display, devices: tuple[Device, Device], prompt: list[int]) -> DemoReport:
    """Raises ``ChildFailed`` when a process does not do its part, ``ConfigError`` for a prompt that does not fit."""
    _check_length(prompt)
    config = demo_config(stage)
    segment_bytes = max(32 << 20, 2 * len(prompt) * _TOKEN_BYTES)
    with display.step(f"starting a metadata server and donors on {devices[0].name} and {devices[1].name}"):
        start_pool(stage, config, devices, segment_bytes=segment_bytes)
    reference = _run(stage, display, "without VCache", devices[0], prompt, None)
    first = _run(stage, display, "engine A", devices[0], prompt, config)
    source = devices_in_use(server_stats(config))
    second = _run(stage, display, "engine B", devices[1], prompt, config)
    if second.tokens_loaded:
        second = msgspec.structs.replace(second, source=source)
    return DemoReport(
        identical=reference.tokens == first.tokens == second.tokens,
        engines=[first, second],
        reference=reference,
        prompt_tokens=len(prompt),
        chunk_size=CHUNK_SIZE,
    )


def _run(
    stage: Stage, display: Display, name: str, device: Device, prompt: list[int], config: VCacheConfig | None
) -> EngineFigures:
    spec = EngineSpec(
        model=str(stage.directory / "model"),
        prompt=prompt,
        max_tokens=GENERATED_TOKENS,
        max_model_len=MAX_TOKENS,
        block_size=BLOCK_SIZE,
        step_tokens=_loadable(prompt),
        connector=None if config is None else _options(config, device),
        gpu=device.gpu,
    )
    path = stage.directory / f"{name.replace(' ', '-')}.json"
    path.write_bytes(msgspec.json.encode(spec))
    title = f"vLLM {name} on {device.name}"
    with display.step(title) as on_stage:
        child = stage.start(name, "vcache.demo.vllm_engine", str(path), environment={})
        result = child.result(timeout_s=ENGINE_TIMEOUT_S, on_stage=on_stage)
        stage.finished(child)
    return _figures(name, device, msgspec.convert(result, EngineOutcome))


def _options(config: VCacheConfig, device: Device) -> dict[str, Any]:
    client = {"call_timeout": config.client.call_timeout, "connect_timeout": config.client.connect_timeout}
    options = {
        "runtime_dir": config.runtime_dir,
        "chunk_size": CHUNK_SIZE,
        "log_level": config.log_level,
        "client": client,
    }
    # A GPU is known by what the KV tensors lie on; a host that stands in for two devices has to be told which it is.
    return options if device.gpu is not None else {**options, "device": device.name}


def _figures(name: str, device: Device, outcome: EngineOutcome) -> EngineFigures:
    def total(kind: str) -> Any:
        return sum(outcome.transfers.get(f"{tier}_{kind}", 0) for tier in ("vram", "dram", "store"))

    return EngineFigures(
        name=name,
        device=device.name,
        tokens_computed=outcome.sources["local_compute"],
        tokens_loaded=outcome.sources["external_kv_transfer"],
        ttft_s=outcome.ttft_s,
        bytes_loaded=total("read_bytes"),
        load_s=total("read_seconds"),
        bytes_stored=total("written_bytes"),
        store_s=total("written_seconds"),
        tokens=outcome.tokens,
    )


def _loadable(prompt: list[int]) -> int:
    """Tokens of the prompt's full chunks, less the last token, which is always computed."""
    return (len(prompt) - 1) // CHUNK_SIZE * CHUNK_SIZE


def _check_length(prompt: list[int]) -> None:
    most = MAX_TOKENS - GENERATED_TOKENS
    if not 2 * CHUNK_SIZE < len(prompt) <= most:
        raise ConfigError(
            f"--prompt: the text has {len(prompt)} tokens; more than {2 * CHUNK_SIZE} are needed to fill chunks, "
            f"and the model takes {most}"
        )
