"""What the demo's children are told, and what they answer: JSON in a file, on standard input and on a pipe."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

# The shape of the KV of Llama 3 8B.
LAYERS: Final = 32
HEADS: Final = 8
HEAD_SIZE: Final = 128
#: K and V of one token in all layers, bfloat16.
TOKEN_BYTES: Final = LAYERS * 2 * HEADS * HEAD_SIZE * 2


class Moved(msgspec.Struct, frozen=True):
    """What VCache counted during one request: bytes and seconds, those read by tier ("vram", "dram", "store")."""

    read_bytes: dict[str, int] = {}
    read_s: float = 0.0
    written_bytes: int = 0
    written_s: float = 0.0


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine is to be. ``connector``: the connector's options, or None for vLLM without VCache."""

    model: str
    max_model_len: int
    block_size: int
    step_tokens: int
    connector: dict[str, Any] | None
    gpu: int | None = None
    gpu_memory_fraction: float = 0.3


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt for an engine, which first forgets what it kept of earlier ones."""

    prompt: list[int]
    max_tokens: int


class EngineOutcome(msgspec.Struct, frozen=True):
    """What came out. ``sources``: prompt tokens by where vLLM says their KV came from; ``seconds``: of the whole answer."""

    tokens: list[int]
    ttft_s: float
    seconds: float
    sources: dict[str, int]
    moved: Moved | None


class WorkerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a plain worker is to be: it has KV for ``tokens``, a whole number of chunks, scattered by ``seed``."""

    device: str
    tokens: int
    seed: int


class Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt's KV for a plain worker to store or load, ``rounds`` times. Each number is another prompt."""

    task: Literal["store", "retrieve"]
    prompt: int
    tokens: int
    rounds: int


class MoveOutcome(msgspec.Struct, frozen=True):
    """What came out. ``tokens``, ``moved`` and ``wrong_bytes`` (found in the KV tensors) are of the last round.

    ``seconds`` and ``copy_seconds`` are those of each round, of VCache and of a plain copy.
    """

    tokens: int
    seconds: list[float]
    copy_seconds: list[float]
    threads: int
    wrong_bytes: int
    moved: Moved
