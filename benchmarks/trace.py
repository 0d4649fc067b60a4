"""Request traces: which chunks each request's prompt consists of, and what any cache could make of them.

The format is that of the traces published with Mooncake (FAST'25): one JSON object a line with ``timestamp`` (ms) and
``hash_ids``, an id per block of 512 tokens; an id names its block and all before it, as our keys do. Not here: what the
pool makes of a trace (``benchmarks.replay``).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Final

from vcache.protocol import KEY_BYTES

TOKENS_PER_CHUNK: Final = 512
_NEVER: Final = 1 << 62


class TraceError(Exception):
    """A file is no trace of this format; says where."""


@dataclass(frozen=True)
class Request:
    """One prompt: when it comes, and its chunks from the first on."""

    arrival_s: float
    chunks: tuple[int, ...]

    @property
    def keys(self) -> bytes:
        """The chunks' keys, as calls carry them."""
        return b"".join(chunk.to_bytes(KEY_BYTES, "little") for chunk in self.chunks)


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]

    @property
    def references(self) -> int:
        return sum(len(request.chunks) for request in self.requests)

    @property
    def unique_chunks(self) -> int:
        return len({chunk for request in self.requests for chunk in request.chunks})

    def head(self, requests: int) -> Trace:
        """The trace's beginning."""
        return Trace(self.name, self.requests[:requests])


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises ``TraceError`` naming the line that is not of the format."""
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                requests.append(_request(line, f"{path}:{number}"))
    if not requests:
        raise TraceError(f"{path}: no requests")
    return Trace(path.stem, tuple(sorted(requests, key=lambda request: request.arrival_s)))


def _request(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
        chunks = tuple(fields["hash_ids"])
        arrival_s = float(fields["timestamp"]) / 1000
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{where}: not a JSON object with timestamp and hash_ids: {error!r}") from error
    if not all(isinstance(chunk, int) and 0 <= chunk < _NEVER for chunk in chunks):
        raise TraceError(f"{where}: hash_ids must be integers that are not negative")
    return Request(arrival_s, chunks)


def generated_trace(*, sessions: int, seed: int = 0) -> Trace:
    """Conversations of a few turns over a handful of shared system prompts, overlapping in time."""
    draw = random.Random(seed)
    chunks = iter(range(1 << 40))
    systems = [[next(chunks) for _ in range(draw.randint(1, 8))] for _ in range(8)]
    requests = []
    for _ in range(sessions):
        prompt = list(draw.choice(systems))
        arrival_s = draw.uniform(0, sessions)
        for _ in range(min(8, 1 + int(draw.expovariate(0.5)))):
            prompt += [next(chunks) for _ in range(draw.randint(1, 12))]
            requests.append(Request(arrival_s, tuple(prompt)))
            arrival_s += draw.expovariate(1 / 60)
    return Trace("generated", tuple(sorted(requests, key=lambda request: request.arrival_s)))


def ceiling(trace: Trace) -> float:
    """The share of block references that an infinite cache has: no policy and no size can beat it."""
    return 1 - trace.unique_chunks / trace.references


def belady(trace: Trace, capacity: int) -> float:
    """The share of block references that hit under Belady's optimum (with bypass) in a cache of ``capacity`` chunks.

    It keeps what is used again soonest and never stores what is not used again. A prefix is always used no later than what
    follows it, so the hits of a request are a leading run here too: no policy that stores whole chunks can have more.
    """
    references = [chunk for request in trace.requests for chunk in request.chunks]
    next_use = _next_uses(references)
    kept: dict[int, int] = {}
    latest: list[tuple[int, int]] = []  # (-next use, chunk): the top is used again last; stale items are skipped
    hits = 0
    for at, chunk in enumerate(references):
        hits += chunk in kept
        if next_use[at] == _NEVER:
            kept.pop(chunk, None)
            continue
        if chunk not in kept and len(kept) >= capacity:
            while kept.get(latest[0][1]) != -latest[0][0]:
                heappop(latest)
            if -latest[0][0] <= next_use[at]:
                continue
            del kept[heappop(latest)[1]]
        kept[chunk] = next_use[at]
        heappush(latest, (-next_use[at], chunk))
    return hits / len(references)


def _next_uses(references: Sequence[int]) -> list[int]:
    following: dict[int, int] = {}
    next_use = [0] * len(references)
    for at in range(len(references) - 1, -1, -1):
        next_use[at] = following.get(references[at], _NEVER)
        following[references[at]] = at
    return next_use
