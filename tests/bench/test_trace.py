"""Traces: read from files, generated, and what no cache can beat."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache

import pytest

from benchmarks.trace import Request, Trace, TraceError, belady, ceiling, generated_trace, read_trace
from vcache.protocol import KEY_BYTES


def trace_of(*prompts: list[int]) -> Trace:
    return Trace("test", tuple(Request(float(at), tuple(prompt)) for at, prompt in enumerate(prompts)))


def test_a_file_is_read_in_the_order_of_arrival(tmp_path):
    path = tmp_path / "small.jsonl"
    lines = [{"timestamp": 2000, "hash_ids": [0, 2]}, {"timestamp": 500, "hash_ids": [0, 1], "output_length": 7}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = read_trace(path)
    assert trace.name == "small"
    assert [(r.arrival_s, r.chunks) for r in trace.requests] == [(0.5, (0, 1)), (2.0, (0, 2))]
    assert len(trace.requests[0].keys) == 2 * KEY_BYTES
    assert trace.requests[0].keys[:KEY_BYTES] == trace.requests[1].keys[:KEY_BYTES]


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"timestamp": 1}', '{"timestamp": 1, "hash_ids": ["a"]}', '{"timestamp": 1, "hash_ids": [-1]}']
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(TraceError, match=r"bad\.jsonl:2"):
        read_trace(path)


def test_an_empty_file_is_no_trace(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TraceError, match="no requests"):
        read_trace(tmp_path / "empty.jsonl")


def test_the_ceiling_is_what_an_infinite_cache_has():
    assert ceiling(trace_of([1, 2, 3], [1, 2, 4], [1, 2, 3])) == 5 / 9


def test_an_unbounded_optimum_reaches_the_ceiling():
    trace = generated_trace(sessions=40)
    assert belady(trace, trace.unique_chunks) == ceiling(trace)


def test_the_optimum_is_that_of_an_exhaustive_search():
    draw = random.Random(1)
    for _ in range(30):
        prompts = [[draw.randint(0, 4) for _ in range(draw.randint(1, 3))] for _ in range(4)]
        trace = trace_of(*prompts)
        for capacity in (1, 2, 3):
            assert belady(trace, capacity) * trace.references == pytest.approx(most_hits(trace, capacity))


def most_hits(trace: Trace, capacity: int) -> int:
    """Tries every choice of what to keep after every reference."""
    references = [chunk for request in trace.requests for chunk in request.chunks]

    @cache
    def best(at: int, kept: frozenset[int]) -> int:
        if at == len(references):
            return 0
        chunk = references[at]
        having = kept | {chunk}
        choices = [frozenset(c) for size in range(capacity + 1) for c in itertools.combinations(sorted(having), size)]
        return (chunk in kept) + max(best(at + 1, choice) for choice in choices)

    return best(0, frozenset())


def test_a_generated_trace_has_shared_prefixes_and_is_the_same_again():
    trace = generated_trace(sessions=50)
    assert trace == generated_trace(sessions=50)
    assert trace != generated_trace(sessions=50, seed=1)
    assert 0.2 < ceiling(trace) < 0.95
    assert [r.arrival_s for r in trace.requests] == sorted(r.arrival_s for r in trace.requests)
