"""What a demo found out, as it is printed and as ``--json`` writes it."""

from __future__ import annotations

import msgspec


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's part. Token counts are vLLM's own; bytes and seconds are VCache's.

    source: where the tokens loaded came from: devices of the segments that held them; empty when none were loaded.
    ttft_s: time to the first token (None where no model runs).
    tokens: what was generated.
    """

    name: str
    device: str
    tokens_computed: int
    tokens_loaded: int
    ttft_s: float | None
    source: str = ""
    bytes_loaded: int = 0
    load_s: float = 0.0
    bytes_stored: int = 0
    store_s: float = 0.0
    tokens: list[int] = []


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of one direction against ``torch.Tensor.copy_`` of the same bytes, measured in turns with it.

    ratio: median over the rounds of (copy_ time / our time).
    """

    gb_s: float
    copy_gb_s: float
    ratio: float
    threads: int
    rounds: int


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole outcome. ``identical``: what came out equals what comes out without VCache, byte by byte."""

    identical: bool
    engines: list[EngineFigures]
    prompt_tokens: int
    chunk_size: int
    reference: EngineFigures | None = None
    store: Bandwidth | None = None
    retrieve: Bandwidth | None = None

    @property
    def loaded(self) -> int:
        """Tokens that the second engine did not have to compute."""
        return self.engines[-1].tokens_loaded

    @property
    def passed(self) -> bool:
        return self.identical and self.loaded > 0


def gb_per_s(nbytes: int, seconds: float) -> float:
    """10^9 bytes per second; 0 where nothing was moved."""
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0
