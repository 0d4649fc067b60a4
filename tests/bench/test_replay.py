"""Replays through the real state machine: hits as expected, never more than can be."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from benchmarks import replay as replaying
from benchmarks.measure import Effort
from benchmarks.replay import replay
from benchmarks.trace import Request, Trace, belady, ceiling, generated_trace
from vram_metadata_server.settings import EvictionPolicyName

POLICIES = get_args(EvictionPolicyName)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_that_holds_everything_reaches_the_ceiling(policy):
    trace = generated_trace(sessions=30)
    replayed = replay(trace, segments=2, chunks_per_segment=trace.unique_chunks * 2, policy=policy)
    assert replayed.hit_rate == ceiling(trace)
    assert replayed.not_stored_rate == 0
    assert len(replayed.us_per_request) == len(trace.requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("segments", [1, 3])
def test_a_smaller_pool_has_fewer_hits_and_never_beats_the_optimum(policy, segments):
    trace = generated_trace(sessions=40)
    rates = [
        replay(trace, segments=segments, chunks_per_segment=chunks, policy=policy).hit_rate for chunks in (64, 256)
    ]
    optima = [belady(trace, segments * chunks) for chunks in (64, 256)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert all(rate <= optimum for rate, optimum in zip(rates, optima, strict=True))


def test_a_prompt_that_comes_again_is_a_hit_as_far_as_it_was_stored():
    trace = Trace("again", tuple(Request(float(at), tuple(range(40))) for at in range(3)))
    assert replay(trace, segments=1, chunks_per_segment=64, policy="lru").hit_rate == 2 / 3


def test_the_benchmark_takes_files_and_puts_policies_beside_the_optimum(tmp_path, monkeypatch):
    monkeypatch.setattr(replaying, "CHUNKS_PER_SEGMENT", 64)
    path = tmp_path / "mine.jsonl"
    trace = generated_trace(sessions=10)
    lines = [{"timestamp": 1000 * r.arrival_s, "hash_ids": list(r.chunks)} for r in trace.requests]
    path.write_text("\n".join(map(json.dumps, lines)))
    results = replaying.run(Effort.QUICK, [path])
    rates = [r for r in results if r.benchmark == "replay: hit rate"]
    assert {r.contestant for r in rates} == {"infinite cache", "Belady's optimum", *POLICIES}
    assert {r.panel for r in rates} == {"mine"}
    assert [r.median for r in rates if r.contestant == "infinite cache"] == [pytest.approx(100 * ceiling(trace))] * 2
    assert all(r.against == "Belady's optimum" and r.ratio <= 1 for r in rates if r.contestant in POLICIES)
