"""Human sizes and durations: what they mean, what is refused and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.units import approximate_size, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        (" 1.5MiB ", 3 << 19),
        ("64KiB", 65_536),
        ("2TiB", 2 << 40),
        ("8GB", 8 * 10**9),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        (4096.0, 4096),
        ("1e3", 1000),
        (0, 0),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("8G", "8GiB .* or 8GB"),
        ("8 Mi", "8MiB"),
        ("8 parsecs", "not a unit of size; .* such as 8GiB"),
        ("", "not a size"),
        ("GiB", "not a size"),
        ("-1GiB", "not a size"),
        ("1.5B", "whole number of bytes"),
        (-1, "negative"),
        (1.5, "not a size"),
        (float("inf"), "not a size"),
        (True, "not a size"),
        (None, "not a size"),
    ],
)
def test_a_bad_size_is_refused_with_what_would_work(text, fix):
    with pytest.raises(ValueError, match=fix):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("500ms", 0.5),
        ("100 ms", 0.1),
        ("250us", 0.00025),
        ("2min", 120.0),
        ("1.5h", 5400.0),
        ("3", 3.0),
        (3, 3.0),
        (0.25, 0.25),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10 parsecs", "10m", "", "-1s", "s", -1, float("nan"), float("inf"), True, None, [1]])
def test_a_bad_duration_is_refused_with_what_would_work(text):
    with pytest.raises(ValueError, match="such as 500ms or 10s"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_size_survives_being_written(nbytes):
    assert parse_size(format_size(nbytes)) == nbytes


@given(st.floats(min_value=0, max_value=86_400, allow_nan=False) | st.integers(min_value=0, max_value=86_400))
def test_a_duration_survives_being_written(seconds):
    assert parse_duration(format_duration(seconds)) == seconds


def test_sizes_for_the_eye():
    assert [approximate_size(n) for n in (0, 1023, 1 << 20, 3_972_844_748)] == ["0 B", "1023 B", "1.0 MiB", "3.7 GiB"]
