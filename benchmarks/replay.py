"""Hit rate by capacity: request traces through the real state machine, beside an infinite cache and Belady's optimum.

A worker per segment, all on one host; requests go to the workers in turn. Each acquires what the pool has of its prompt and
stores the rest, a prefill step at a time; donors obey between two steps. No payloads and no sockets.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

from benchmarks.measure import Effort, Result, spread
from benchmarks.state_machine import FOREVER_S, StateMachine, without_garbage_collector
from benchmarks.trace import TOKENS_PER_CHUNK, Trace, belady, ceiling, generated_trace, read_trace
from vcache.protocol import KEY_BYTES
from vram_metadata_server.integrity import check_integrity
from vram_metadata_server.settings import EvictionPolicyName, ServiceSettings

#: 524,288 tokens: 20 GiB on each of 8 GPUs for a model of 320 KiB a token (Llama 70B in bf16).
CHUNKS_PER_SEGMENT: Final = 1024
SEGMENTS: Final = (1, 2, 4, 8, 16, 32, 64)
QUICK_SEGMENTS: Final = (1, 4)
QUICK_REQUESTS: Final = 500
GENERATED_SESSIONS: Final = 2000
#: What one prefill step stores: 8,192 tokens.
_CHUNKS_PER_STEP: Final = 16
_PAYLOAD_BYTES: Final = 4096
_BELADY: Final = "Belady's optimum"
_INFINITE: Final = "infinite cache"


@dataclass(frozen=True)
class Replayed:
    """What came of one trace in one pool."""

    hit_rate: float
    not_stored_rate: float
    us_per_request: list[float]


def run(effort: Effort, traces: Sequence[Path] = ()) -> list[Result]:
    """Hit rates in percent of the traces' block references, and the server's microseconds per request.

    Without ``traces`` a generated one is replayed. Raises ``RuntimeError`` when a policy beats what cannot be beaten.
    """
    replayed = [read_trace(path) for path in traces] or [generated_trace(sessions=GENERATED_SESSIONS)]
    segments: tuple[int, ...] = SEGMENTS
    if effort is Effort.QUICK:
        replayed = [trace.head(QUICK_REQUESTS) for trace in replayed]
        segments = QUICK_SEGMENTS
    # Entries and placements refer to each other and are unknown to the garbage collector: each replay has its process.
    with ProcessPoolExecutor(
        max_workers=len(os.sched_getaffinity(0)),
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    ) as processes:
        policies = get_args(EvictionPolicyName)
        outcomes = {
            (trace.name, count): {
                policy: processes.submit(_replay_job, trace, count, CHUNKS_PER_SEGMENT, policy) for policy in policies
            }
            for trace in replayed
            for count in segments
        }
        return [
            result
            for trace in replayed
            for count in segments
            for result in _results(
                trace,
                count,
                belady(trace, count * CHUNKS_PER_SEGMENT),
                {policy: outcome.result() for policy, outcome in outcomes[trace.name, count].items()},
            )
        ]


def _replay_job(trace: Trace, segments: int, chunks_per_segment: int, policy: EvictionPolicyName) -> Replayed:
    return replay(trace, segments=segments, chunks_per_segment=chunks_per_segment, policy=policy)


def replay(trace: Trace, *, segments: int, chunks_per_segment: int, policy: EvictionPolicyName) -> Replayed:
    """Sends every request of the trace through a state machine with so many equal segments."""
    machine = StateMachine(ServiceSettings(liveness_s=FOREVER_S, eviction_policy=policy))
    workers = [machine.join(f"worker-{at}") for at in range(segments)]
    for worker in workers:
        worker.donate(data_bytes=chunks_per_segment * _PAYLOAD_BYTES, records=chunks_per_segment)
    hits = asked_to_store = 0
    microseconds = []
    with without_garbage_collector():
        for at, request in enumerate(trace.requests):
            machine.now = max(machine.now, request.arrival_s)
            busy = machine.busy_s
            worker = workers[at % segments]
            keys = request.keys
            found = worker.read(keys)
            hits += found
            asked_to_store += len(request.chunks) - found
            for begin in range(found * KEY_BYTES, len(keys), _CHUNKS_PER_STEP * KEY_BYTES):
                step = keys[begin : begin + _CHUNKS_PER_STEP * KEY_BYTES]
                before = keys[max(0, begin - KEY_BYTES) : begin]
                worker.write(step, parent=before, nbytes=_PAYLOAD_BYTES, tokens=TOKENS_PER_CHUNK)
                machine.tick()
            microseconds.append((machine.busy_s - busy) * 1e6)
    check_integrity(machine.service)
    not_stored = machine.counter("reserve_no_space") / max(1, asked_to_store)
    return Replayed(hits / trace.references, not_stored, microseconds)


def _results(trace: Trace, segments: int, optimum: float, policies: dict[str, Replayed]) -> Iterator[Result]:
    capacity = segments * CHUNKS_PER_SEGMENT
    most = ceiling(trace)
    case = f"{trace.name}, {segments} segments of {CHUNKS_PER_SEGMENT:,} chunks"

    def point(benchmark: str, contestant: str, figures: Sequence[float], unit: str) -> Result:
        median, width = statistics.median(figures), spread(figures)
        return Result(
            f"replay: {benchmark}",
            case,
            contestant,
            median,
            width,
            unit,
            panel=trace.name,
            size=capacity,
            size_unit="chunks the pool holds",
        )

    def share(contestant: str, rate: float) -> Result:
        against_optimum = rate / optimum if optimum and contestant not in (_BELADY, _INFINITE) else None
        against = None if against_optimum is None else _BELADY
        return replace(point("hit rate", contestant, [100 * rate], "%"), ratio=against_optimum, against=against)

    yield share(_INFINITE, most)
    yield share(_BELADY, optimum)
    for policy, replayed in policies.items():
        if replayed.hit_rate > min(most, optimum):
            raise RuntimeError(f"{case}: {policy} hits {replayed.hit_rate:.4f}, the optimum is {optimum:.4f}: a bug")
        yield share(policy, replayed.hit_rate)
    for policy, replayed in policies.items():
        if replayed.not_stored_rate:
            yield point("chunks that found no space", policy, [100 * replayed.not_stored_rate], "% of those missing")
        yield point("server time", policy, replayed.us_per_request, "us/request")
