"""What a demo found out, as it is printed and as ``--json`` writes it."""

from __future__ import annotations

import msgspec


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Moves of the same bytes, each beside a ``torch.Tensor.copy_`` of as many.

    ratio: median over the rounds of (copy_ time / our time).
    """

    gb_s: float
    copy_gb_s: float
    ratio: float
    threads: int
    rounds: int


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's answer to the prompt. Token counts are vLLM's own; bytes and seconds are VCache's.

    identical: whether what came out equals what comes out without VCache (tokens generated, or every byte of KV).
    expected: where the prompt's chunks had to come from: "vram", "dram", the store ("mooncake", "files"); empty when they had to be computed.
    source: where they did come from; several places are joined by "+". source_device: of the segments that held them.
    ttft_s: time to the first token (None where no model runs).
    tokens: what was generated.
    """

    name: str
    device: str
    tokens_computed: int
    tokens_loaded: int
    identical: bool
    expected: str = ""
    source: str = ""
    source_device: str = ""
    ttft_s: float | None = None
    bytes_loaded: int = 0
    load_s: float = 0.0
    bytes_stored: int = 0
    store_s: float = 0.0
    bandwidth: Bandwidth | None = None
    tokens: list[int] = []

    @property
    def place(self) -> str:
        """``source``, as the table has it."""
        return f"{self.source} {self.source_device}".strip()


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole outcome: engine A's answer, then engine B's from each place. ``loadable``: tokens of the prompt's chunks."""

    identical: bool
    passed: bool
    engines: list[EngineFigures]
    prompt_tokens: int
    loadable: int
    chunk_size: int
    reference: EngineFigures | None = None

    @classmethod
    def of(
        cls,
        engines: list[EngineFigures],
        *,
        prompt_tokens: int,
        loadable: int,
        chunk_size: int,
        reference: EngineFigures | None = None,
    ) -> DemoReport:
        """Passed when every answer is identical, and what had to be loaded was, whole, from where it had to come."""
        identical = all(engine.identical for engine in engines)
        as_expected = all(
            engine.source == engine.expected and engine.tokens_loaded == (loadable if engine.expected else 0)
            for engine in engines
        )
        return cls(
            identical=identical,
            passed=identical and as_expected,
            engines=engines,
            prompt_tokens=prompt_tokens,
            loadable=loadable,
            chunk_size=chunk_size,
            reference=reference,
        )


def gb_per_s(nbytes: int, seconds: float) -> float:
    """10^9 bytes per second; 0 where nothing was moved."""
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0
