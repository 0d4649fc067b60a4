"""The pool's keys for LMCache's: every field counts, and nothing but the fields."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lmcache.utils import CacheEngineKey
from vcache_lmcache import keys
from vcache_lmcache.keys import KeyMaker

from tests.lmcache.objects import object_key


def test_keys_of_objects_differ_in_every_field_and_do_not_depend_on_the_batch() -> None:
    make = KeyMaker("").of_objects
    first = object_key("a")
    others = [
        replace(first, chunk_hash=b"x"),
        replace(first, model_name="other"),
        replace(first, kv_rank=1),
        replace(first, object_group_id=1),
        replace(first, cache_salt="salt"),
    ]
    made = make([first, *others, first])
    assert made[0] == made[-1] and len(set(made)) == 6
    assert made == [key for one in [first, *others, first] for key in make([one])]
    assert not set(made) & set(KeyMaker("namespace").of_objects([first, *others]))


def test_keys_of_chunks_differ_in_what_lmcache_compares() -> None:
    make = KeyMaker("").of_chunks

    def chunk(**fields: object) -> CacheEngineKey:
        values = {"model_name": "m", "world_size": 2, "worker_id": 0, "chunk_hash": -5, "dtype": torch.bfloat16}
        return CacheEngineKey(**{**values, **fields})

    different = [
        chunk(),
        chunk(model_name="n"),
        chunk(world_size=1),
        chunk(worker_id=1),
        chunk(chunk_hash=5),
        chunk(chunk_hash=2**200),
        chunk(dtype=torch.float16),
        chunk(request_configs={"lmcache.tag.a": "b"}),
        chunk(request_configs={"lmcache.tag.a": "b", "lmcache.tag.c": "d"}),
        chunk(request_configs={"lmcache.tag.ab": ""}),
    ]
    assert len(set(make(different))) == len(different)
    assert make([chunk(request_configs={"not.a.tag": "x"})]) == make([chunk()]), "LMCache does not compare these"


def test_keys_stay_what_they_are_however_many_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_MAX_REMEMBERED", 8)
    maker = KeyMaker("")
    chunks = [CacheEngineKey("m", 1, 0, at, torch.bfloat16) for at in range(20)]
    for start in (0, 3, 12, 0, 7):
        assert maker.of_chunks(chunks[start : start + 5]) == KeyMaker("").of_chunks(chunks[start : start + 5])
        assert sum(map(len, maker._remembered.values())) <= 8
