"""The page of a stored object: only the very bytes stored under the very name pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.shards import shard
from vcache.errors import CorruptionError
from vcache.store.objects import PAGE_BYTES, sealed, verify

SHARD = shard(1)._replace(ranks=4, layout=1 << 63)
MEANINGFUL = 80  # bytes of the page that say something; the rest is padding


def test_what_was_sealed_is_verified():
    page = sealed(SHARD, b"payload")
    assert len(page) == PAGE_BYTES
    verify(SHARD, page, b"payload")


@given(payload=st.binary(min_size=1, max_size=300), data=st.data())
def test_any_flipped_bit_is_found(payload, data):
    page = bytearray(sealed(SHARD, payload))
    broken = bytearray(payload)
    where = data.draw(st.integers(0, (MEANINGFUL + len(payload)) * 8 - 1))
    target, bit = (page, where) if where < MEANINGFUL * 8 else (broken, where - MEANINGFUL * 8)
    target[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError):
        verify(SHARD, page, broken)


@pytest.mark.parametrize(
    ("asked", "payload", "name"),
    [
        (SHARD._replace(key=shard(2).key), b"payload", "key"),
        (SHARD._replace(rank=1), b"payload", "rank"),
        (SHARD._replace(layout=1), b"payload", "layout"),
        (SHARD._replace(ranks=8), b"payload", "ranks"),
        (SHARD, b"payloa", "size"),
        (SHARD, b"pAyload", "checksum"),
    ],
)
def test_another_object_is_named_as_what_differs(asked, payload, name):
    page = sealed(SHARD, b"payload")
    with pytest.raises(CorruptionError, match=name):
        verify(asked, page, payload)


@pytest.mark.parametrize("page", [b"", bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES, bytes(100)])
def test_a_page_that_is_none_is_refused(page):
    with pytest.raises(CorruptionError):
        verify(SHARD, page, b"payload")
