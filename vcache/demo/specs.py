"""What the demo's children are told, and what they answer: JSON in a file and on a pipe."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

# The shape of the KV of Llama 3 8B.
LAYERS: Final = 32
HEADS: Final = 8
HEAD_SIZE: Final = 128
#: K and V of one token in all layers, bfloat16.
TOKEN_BYTES: Final = LAYERS * 2 * HEADS * HEAD_SIZE * 2


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine is to do. ``connector``: the connector's options, or None for vLLM without VCache."""

    model: str
    prompt: list[int]
    max_tokens: int
    max_model_len: int
    block_size: int
    step_tokens: int
    connector: dict[str, Any] | None
    gpu: int | None = None
    gpu_memory_fraction: float = 0.3


class EngineOutcome(msgspec.Struct, frozen=True):
    """What came out. ``sources``: prompt tokens by where vLLM says their KV came from."""

    tokens: list[int]
    ttft_s: float
    cached_tokens: int
    sources: dict[str, int]
    transfers: dict[str, Any]


class PlainSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the worker is to do; ``tokens`` is a whole number of chunks."""

    task: Literal["store", "retrieve"]
    tokens: int
    device: str
    rounds: int


class PlainOutcome(msgspec.Struct, frozen=True):
    """What came out. ``seconds`` and ``copy_seconds``: of each round. ``wrong_bytes``: found in the last round's blocks."""

    tokens: int
    nbytes: int
    seconds: list[float]
    copy_seconds: list[float]
    threads: int
    wrong_bytes: int
