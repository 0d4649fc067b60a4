"""Reading back what was written: what is still there, whole; never what has taken its place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.pool.payloads import NBYTES, fill, new_keys, payload, start_write, store, until
from vcache.keys import ChunkKey
from vcache.pool.client import PoolClient
from vcache.pool.read_back import Written, read_back


@pytest.fixture
def pool(quick, open_client, open_donor):
    """A client that writes, and a donor of 8 MiB in this process."""
    config, _ = quick
    client = open_client(config)
    return client, open_donor(config)


def written(client: PoolClient, keys: Sequence[ChunkKey], **options) -> Written:
    write = start_write(client, keys, **options)
    fill(write, keys)
    write.complete()
    numbers = set(write.placements["segment"].tolist())
    infos = {number: info for number in numbers if (info := client.session.info(number)) is not None}
    return Written([keys[index] for index in write.granted.tolist()], write.placements, infos)


def check(client: PoolClient, copies: Written, positions: Sequence[int]) -> list[bool]:
    """Which were valid; fails the test when one of these has a wrong byte."""
    buffers = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in positions]
    valid = read_back(client, copies, positions, buffers)
    for position, buffer, whole in zip(positions, buffers, valid, strict=True):
        assert not whole or buffer.numpy().tobytes() == payload(copies.keys[position])
    return valid


def test_any_of_them_in_any_order(pool):
    client, _ = pool
    copies = written(client, new_keys(6))
    assert check(client, copies, range(6)) == [True] * 6
    assert check(client, copies, [5, 0, 3]) == [True] * 3
    assert check(client, copies, []) == []


def test_what_no_lookup_finds_yet(pool):
    client, _ = pool
    keys = new_keys(2)
    write = start_write(client, keys)
    fill(write, keys)
    write.commit_records()  # and the server is not told
    infos = {info.number: info for info in client.session.infos()}
    assert check(client, Written(keys, write.placements, infos), range(2)) == [True, True]
    write.tell()
    write.complete()


def test_what_was_removed_is_not_valid_and_the_others_are(pool):
    client, _ = pool
    keys = new_keys(4)
    copies = written(client, keys)
    assert client.remove(b"".join(keys[1:3])) == 2
    assert check(client, copies, range(4)) == [True, False, False, True]


def test_what_was_overwritten_is_not_valid(pool):
    client, _ = pool
    copies = written(client, new_keys(100))
    assert client.clear() == 100
    others = new_keys(100)
    assert store(client, others) == 100
    assert not any(check(client, copies, range(100)))


def test_what_was_in_a_segment_that_is_gone_is_not_valid(pool):
    client, donor = pool
    copies = written(client, new_keys(3))
    donor.close(1.0)
    until(lambda: not client.mappings.mapped(), "the segment is unmapped")
    assert check(client, copies, range(3)) == [False] * 3
