"""The page of a stored object: only the very bytes stored under the very name pass."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.shards import shard
from vcache.errors import CorruptionError
from vcache.store.objects import PAGE_BYTES, ObjectFormat, sealed, verify

FORM = ObjectFormat(b"L" * 16, ranks=4)
MEANINGFUL = 88  # bytes of the page that say something; the rest is padding


def test_what_was_sealed_is_verified():
    page = sealed(FORM, shard(1, 3), b"payload")
    assert len(page) == PAGE_BYTES
    verify(FORM, shard(1, 3), page, b"payload")


@given(payload=st.binary(min_size=1, max_size=300), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_is_found(payload, data):
    page = bytearray(sealed(FORM, shard(1), payload))
    broken = bytearray(payload)
    where = data.draw(st.integers(0, (MEANINGFUL + len(payload)) * 8 - 1))
    target, bit = (page, where) if where < MEANINGFUL * 8 else (broken, where - MEANINGFUL * 8)
    target[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError):
        verify(FORM, shard(1), page, broken)


@pytest.mark.parametrize(
    ("form", "asked", "payload", "name"),
    [
        (FORM, shard(2), b"payload", "key"),
        (FORM, shard(1, 1), b"payload", "rank"),
        (ObjectFormat(b"M" * 16, ranks=4), shard(1), b"payload", "layout"),
        (ObjectFormat(b"L" * 16, ranks=8), shard(1), b"payload", "ranks"),
        (FORM, shard(1), b"payloa", "size"),
        (FORM, shard(1), b"pAyload", "checksum"),
    ],
)
def test_another_object_is_named_as_what_differs(form, asked, payload, name):
    page = sealed(FORM, shard(1), b"payload")
    with pytest.raises(CorruptionError, match=name):
        verify(form, asked, page, payload)


@pytest.mark.parametrize("page", [b"", bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES, bytes(100)])
def test_a_page_that_is_none_is_refused(page):
    with pytest.raises(CorruptionError):
        verify(FORM, shard(1), page, b"payload")
