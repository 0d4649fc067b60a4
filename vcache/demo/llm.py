"""The main job with real engines: vLLM without VCache says what must come out, then two engines play the story.

Engine A and engine B have the same options, only the device differs. All steps of an engine end where the part of the prompt
that B loads ends. So B computes the rest in the same shapes as the others do, and its tokens are the same to the last bit:
with other shapes bfloat16 sums round differently and a near tie between two tokens may fall the other way, with VCache or
without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from vcache.demo.devices import Device, Devices
from vcache.demo.display import Display
from vcache.demo.figures import DemoReport, EngineFigures
from vcache.demo.model import HEAD_SIZE, HEADS, LAYERS, MAX_TOKENS
from vcache.demo.pool import BLOCK_SIZE, CHUNK_SIZE
from vcache.demo.processes import Child, Stage
from vcache.demo.specs import EngineOutcome, EngineSpec, Moved, Question
from vcache.demo.story import OnStage, Scene, source_of
from vcache.errors import ConfigError

ENGINE_TIMEOUT_S: Final = 300.0
GENERATED_TOKENS: Final = 32
CHUNK_BYTES: Final = CHUNK_SIZE * LAYERS * 2 * HEADS * HEAD_SIZE * 2


def run_llm(stage: Stage, display: Display, devices: Devices, prompt: list[int]) -> DemoReport:
    """Raises ``ChildFailed`` when a process does not do its part, ``ConfigError`` for a prompt that does not fit."""
    _check_length(prompt)
    loadable = _loadable(prompt)
    with display.step(f"vLLM without VCache on {devices.first.name}") as on_stage:
        alone = VLLMEngine(stage, "without VCache", devices.first, prompt)
        alone.await_ready(on_stage)
        reference = alone.answer(on_stage)
        stage.finish(alone.child)
    scene = Scene(stage, display, devices, chunks=len(prompt) // CHUNK_SIZE, chunk_bytes=CHUNK_BYTES)
    with display.step(
        f"starting two vLLM engines, A on {devices.first.name} and B on {devices.second.name}"
    ) as on_stage:
        first, second = (
            VLLMEngine(stage, name, device, prompt, environment=scene.config.environment(), must_be=reference.tokens)
            for name, device in (("engine A", devices.first), ("engine B", devices.second))
        )
        first.await_ready(on_stage)
        second.await_ready(on_stage)
    return DemoReport.of(
        scene.play(first, second),
        prompt_tokens=len(prompt),
        loadable=loadable,
        chunk_size=CHUNK_SIZE,
        reference=reference,
    )


class VLLMEngine:
    """The parent's side of one engine; it starts when this is made."""

    def __init__(
        self,
        stage: Stage,
        name: str,
        device: Device,
        prompt: list[int],
        *,
        environment: Mapping[str, str] | None = None,
        must_be: Sequence[int] | None = None,
    ) -> None:
        """``environment``: VCache's settings; without it vLLM is alone. ``must_be``: the tokens that are right."""
        self.name = name
        self._device = device
        self._prompt = prompt
        self._must_be = must_be
        # A GPU is known by what the KV tensors lie on; a host that stands in for two devices has to be told which it is.
        options = {} if device.gpu is not None else {"device": device.name}
        spec = EngineSpec(
            model=str(stage.directory / "model"),
            max_model_len=MAX_TOKENS,
            block_size=BLOCK_SIZE,
            step_tokens=_loadable(prompt),
            connector=options if environment is not None else None,
            gpu=device.gpu,
        )
        path = stage.directory / f"{name.replace(' ', '-')}.json"
        path.write_bytes(msgspec.json.encode(spec))
        self.child: Child = stage.start(name, "vcache.demo.vllm_engine", str(path), environment=environment or {})

    def await_ready(self, on_stage: OnStage) -> None:
        """Waits until it can answer."""
        self.child.result(timeout_s=ENGINE_TIMEOUT_S, on_stage=on_stage)

    def answer(self, on_stage: OnStage) -> EngineFigures:
        outcome = self._ask(Question(self._prompt, GENERATED_TOKENS), on_stage)
        moved = outcome.moved or Moved()
        return EngineFigures(
            name=self.name,
            device=self._device.name,
            tokens_computed=outcome.sources["local_compute"],
            tokens_loaded=outcome.sources["external_kv_transfer"],
            identical=self._must_be is None or outcome.tokens == self._must_be,
            source=source_of(moved),
            ttft_s=outcome.ttft_s,
            bytes_loaded=sum(moved.read_bytes.values()),
            load_s=moved.read_s,
            bytes_stored=moved.written_bytes,
            store_s=moved.written_s,
            tokens=outcome.tokens,
        )

    def store_others(self, chunks: int, on_stage: OnStage) -> None:
        others = self._prompt[::-1][: chunks * CHUNK_SIZE + 1]
        self._ask(Question(others, 1), on_stage)

    def _ask(self, question: Question, on_stage: OnStage) -> EngineOutcome:
        result = self.child.ask(question, timeout_s=ENGINE_TIMEOUT_S, on_stage=on_stage)
        return msgspec.convert(result, EngineOutcome)


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
