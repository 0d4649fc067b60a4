"""Keys side by side behave as the sequence of keys that they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.arguments import check_keys
from vcache.joined_keys import JoinedKeys, join_keys

keys = st.lists(st.binary(min_size=16, max_size=16), max_size=8)
ends = st.none() | st.integers(-10, 10)


@given(keys, ends, ends, st.none() | st.sampled_from([1, 2, 3, -1, -2]))
def test_they_are_sliced_and_counted_as_a_list_is(several, first, last, step):
    joined = JoinedKeys(b"".join(several))
    assert list(joined) == several and len(joined) == len(several)
    assert list(joined[first:last:step]) == several[first:last:step]
    assert isinstance(joined[first:last:step], JoinedKeys)
    assert join_keys(joined) == join_keys(several)
    check_keys("keys", joined)


def test_an_index_is_of_a_key():
    joined = JoinedKeys(b"a" * 16 + b"b" * 16)
    assert (joined[0], joined[1], joined[-1]) == (b"a" * 16, b"b" * 16, b"b" * 16)
    for outside in (2, -3):
        with pytest.raises(IndexError):
            joined[outside]


def test_half_a_key_is_refused():
    with pytest.raises(ValueError, match="joined: 17 bytes are not a whole number of keys"):
        JoinedKeys(bytes(17))
