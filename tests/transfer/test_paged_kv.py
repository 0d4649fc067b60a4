"""How engines' tensors are read as planes, and which ones are refused with a reason."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from vcache.paged_kv import KVExpectation, PagedKV
from vcache.transfer import gather

BF16 = torch.bfloat16


def cache(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def of_heads(*, num_layers: int, num_kv_heads: int, block_size: int) -> KVExpectation:
    """Plain attention: K and V of heads of 64 elements."""
    return KVExpectation(num_layers, 2 * num_kv_heads * 64 * block_size * BF16.itemsize)


def summary(kv: PagedKV) -> tuple[int, int, int]:
    return len(kv.planes), kv.num_blocks, kv.planes[0].block_bytes


READABLE = {
    "vLLM on a CPU: block first, K and V packed in a block": (cache(10, 4, 32, 128), (1, 10, 32768)),
    "block first, K/V inside": (cache(10, 2, 16, 4, 64), (1, 10, 16384)),
    "K and V halves": (cache(2, 10, 16, 4, 64), (2, 10, 8192)),
    "flat K and V halves": (cache(2, 10, 4096), (2, 10, 8192)),
    "MLA": (cache(10, 16, 576), (1, 10, 18432)),
    "opaque pages": (cache(10, 4096, dtype=torch.int8), (1, 10, 4096)),
    "one block": (cache(1, 16, 576), (1, 1, 18432)),
}


@pytest.mark.parametrize("name", READABLE)
def test_layouts_of_one_layer(name: str) -> None:
    tensor, expected = READABLE[name]
    planes, num_blocks, block_bytes = expected
    assert summary(PagedKV(tensor, block_size=16)) == expected
    assert summary(PagedKV([tensor], block_size=16)) == expected
    assert summary(PagedKV({"a": tensor, "b": tensor.clone()}, block_size=16)) == (2 * planes, num_blocks, block_bytes)


def test_k_and_v_apart() -> None:
    kv = PagedKV([(cache(10, 16, 4, 64), cache(10, 16, 4, 64)) for _ in range(3)], block_size=16)
    assert summary(kv) == (6, 10, 8192)
    assert [plane.name for plane in kv.planes[:3]] == ["kv_caches[0][0]", "kv_caches[0][1]", "kv_caches[1][0]"]


@pytest.mark.parametrize("hint", [{"num_blocks": 10}, {"block_axis": 1}, {"expect": KVExpectation(num_layers=3)}])
def test_layers_stacked_in_one_tensor_need_a_hint(hint: dict[str, Any]) -> None:
    kv = PagedKV(cache(3, 10, 4, 32, 128), block_size=32, **hint)
    assert summary(kv) == (3, 10, 32768)


def test_stacked_layers_in_halves() -> None:
    kv = PagedKV(cache(3, 2, 10, 16, 4, 64), block_size=16, expect=KVExpectation(num_layers=3))
    assert summary(kv) == (6, 10, 8192)


def test_layers_inside_a_block() -> None:
    kv = PagedKV(cache(10, 3, 2, 16, 4, 64), block_size=16, expect=KVExpectation(num_layers=3))
    assert summary(kv) == (1, 10, 49152)


AMBIGUOUS = {
    "two packed blocks, or halves": cache(2, 8, 32, 128),
    "two blocks either way": cache(2, 2, 16, 4, 64),
    "two MLA blocks, or halves": cache(2, 16, 576),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_shape_that_reads_two_ways_is_refused_until_a_hint_settles_it(name: str) -> None:
    tensor = AMBIGUOUS[name]
    with pytest.raises(ValueError, match=r"kv_caches\['l0'\] .*axis 0 or 1: pass block_axis="):
        PagedKV({"l0": tensor}, block_size=16)
    assert summary(PagedKV({"l0": tensor}, block_size=16, block_axis=0))[:2] == (1, 2)
    assert summary(PagedKV({"l0": tensor}, block_size=16, block_axis=1))[:2] == (2, tensor.shape[1])


def test_the_model_description_settles_it_too() -> None:
    tensor = cache(2, 8, 32, 128)
    heads = of_heads(num_layers=1, num_kv_heads=8, block_size=32)
    assert summary(PagedKV([tensor], block_size=32, expect=heads)) == (1, 2, 65536)
    flat = of_heads(num_layers=1, num_kv_heads=2, block_size=32)
    assert summary(PagedKV([tensor], block_size=32, expect=flat)) == (2, 8, 8192)


def test_another_layer_settles_it() -> None:
    assert summary(PagedKV([cache(2, 8, 32, 128), cache(8, 32, 576)], block_size=32))[:2] == (3, 8)


def test_the_table_says_where_each_plane_is_and_where_it_begins_in_a_payload() -> None:
    caches = [cache(2, 10, 16, 4, 64), cache(10, 16, 64)]
    kv = PagedKV(caches, block_size=16)
    first, second = (tensor.data_ptr() for tensor in caches)
    assert np.frombuffer(kv.table, dtype=np.int64).reshape(-1, 4).tolist() == [
        [first, 8192, 8192, 0],
        [first + 81920, 8192, 8192, 8192],
        [second, 2048, 2048, 16384],
    ]


def test_the_memory_stays_for_as_long_as_the_mapping_but_not_the_tensors() -> None:
    tensor = cache(10, 16, 64)
    gone = weakref.ref(tensor)
    tensor.fill_(1)
    kv = PagedKV([tensor], block_size=16)
    del tensor
    assert gone() is None
    segment = torch.zeros(2048, dtype=torch.uint8)
    gather(kv, np.array([[9]]), segment, np.array([0]))
    assert segment.view(BF16).eq(1).all()


def test_a_mapping_without_memory_copies_nothing() -> None:
    kv = PagedKV([cache(10, 16, 64)], block_size=16).without_memory()
    segment = torch.ones(2048, dtype=torch.uint8)
    gather(kv, np.array([[9]]), segment, np.array([0]))
    assert segment.eq(1).all()


def test_heads_before_tokens_in_memory_make_another_layout() -> None:
    tokens_first = cache(2, 10, 16, 4, 64)
    heads_first = cache(2, 10, 4, 16, 64).transpose(2, 3)
    assert heads_first.shape == tokens_first.shape
    a, b = PagedKV([tokens_first], block_size=16), PagedKV([heads_first], block_size=16)
    assert summary(a) == summary(b)
    assert a.layout != b.layout
    assert a.layout == PagedKV([cache(2, 99, 16, 4, 64)], block_size=16).layout


def test_k_and_v_interleaved_inside_a_block_are_one_plane() -> None:
    memory = cache(10, 16, 2, 4, 64)  # [blocks, tokens, K/V, heads, size]
    kv = PagedKV([memory.permute(2, 0, 1, 3, 4)], block_size=16)
    assert summary(kv) == (1, 10, 16384)


def test_the_halves_of_a_block_side_by_side_are_two_planes() -> None:
    memory = cache(10, 2, 16, 4, 64)
    kv = PagedKV([memory.transpose(0, 1)], block_size=16)
    assert summary(kv) == (2, 10, 8192)
    assert kv.planes[0].stride_bytes == 16384


def _aliased() -> dict[str, torch.Tensor]:
    tensor = cache(10, 16, 64)
    return {"l0": tensor, "l1": cache(10, 16, 64), "l2": tensor}


def _shifted() -> list[torch.Tensor]:
    storage = cache(11 * 1024)
    return [storage[: 10 * 1024].view(10, 16, 64), storage[512 : 512 + 10 * 1024].view(10, 16, 64)]


UNMAPPABLE: dict[str, tuple[Any, str]] = {
    "no tensors": ({}, "kv_caches is empty"),
    "no tensor": ({"l0": [1, 2]}, r"kv_caches\['l0'\]\[0\] must be a tensor, not int"),
    "not a container": (7, "must be a tensor, or a dict or list of tensors, not int"),
    "nothing in it": ([cache(4, 16, 8), cache(0, 16, 8)], r"kv_caches\[1\] is empty \(shape \(0, 16, 8\)\)"),
    "one axis": ({"l0": cache(64)}, r"kv_caches\['l0'\] has shape \(64,\)"),
    "another device": (
        [cache(4, 16, 8), cache(4, 16, 8).to("meta")],
        r"kv_caches\[1\] is torch.strided on meta; a dense tensor on cpu or cuda",
    ),
    "sparse": ([torch.zeros(4, 16).to_sparse()], r"kv_caches\[0\] is torch.sparse_coo on cpu"),
    "another number of blocks": (
        {"l0": cache(10, 16, 64), "l1": cache(12, 16, 64)},
        r"kv_caches\['l1'\] of shape \(12, 16, 64\) has 12 blocks, but kv_caches\['l0'\] .* has 10",
    ),
    "tokens of a block apart": (
        [cache(16, 10, 64).transpose(0, 1)],
        r"kv_caches\[0\]: the inside of a block is not contiguous",
    ),
    "every other byte": ([cache(10, 16, 128)[..., ::2]], "the inside of a block is not contiguous"),
    "one block shown ten times": ([cache(1, 16, 64).expand(10, 16, 64)], "lie 0 bytes apart and overlap"),
    "a layer given twice": (_aliased(), r"kv_caches\['l[02]'\] shares bytes with kv_caches\['l[02]'\]"),
    "layers that overlap": (_shifted(), r"kv_caches\[0\] shares bytes with kv_caches\[1\]"),
}


@pytest.mark.parametrize("name", UNMAPPABLE)
def test_what_cannot_be_mapped_is_refused_with_its_name_and_reason(name: str) -> None:
    kv_caches, message = UNMAPPABLE[name]
    with pytest.raises(ValueError, match=message):
        PagedKV(kv_caches, block_size=16)


def test_interleaved_layers_do_not_overlap() -> None:
    memory = cache(10, 3, 16, 64)  # [blocks, layers, ...]
    kv = PagedKV(list(memory.unbind(1)), block_size=16)
    assert summary(kv) == (3, 10, 2048)


HEADS = of_heads(num_layers=2, num_kv_heads=4, block_size=16)
UNEXPECTED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a layer too few": (
        {"l0": cache(2, 10, 16, 4, 64)},
        {"expect": HEADS},
        r"holds 1 layers \(kv_caches\['l0'\] to kv_caches\['l0'\]\); the model description says 2",
    ),
    "a layer of other heads": (
        {"l0": cache(2, 10, 16, 4, 64), "l1": cache(2, 10, 16, 8, 64)},
        {"expect": HEADS},
        r"kv_caches\['l1'\] of shape .* and dtype torch.bfloat16 has 32768 or 163840 bytes a block; by .* have 16384",
    ),
    "another dtype": (
        [cache(2, 10, 16, 4, 64, dtype=torch.float32)] * 2,
        {"expect": HEADS},
        r"kv_caches\[0\] of shape",
    ),
    "a stack of too few": (cache(3, 10, 2, 16, 4, 64), {"num_blocks": 10, "expect": HEADS}, "it should have 32768"),
    "another number of blocks": (
        [cache(2, 10, 16, 4, 64)],
        {"num_blocks": 11},
        r"kv_caches\[0\] of shape \(2, 10, 16, 4, 64\) cannot be read as num_blocks=11 blocks",
    ),
    "no such axis": ([cache(10, 16, 64)], {"block_axis": 2}, r"block_axis=2 does not fit kv_caches\[0\]"),
    "no block size": ([cache(10, 16, 64)], {"block_size": 0}, "block_size must be at least 1"),
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_what_contradicts_a_hint_is_refused(name: str) -> None:
    kv_caches, hints, message = UNEXPECTED[name]
    with pytest.raises(ValueError, match=message):
        PagedKV(kv_caches, **{"block_size": 16, **hints})


def test_a_cache_that_fits_its_description_is_taken() -> None:
    kv = PagedKV([cache(2, 10, 16, 4, 64) for _ in range(2)], block_size=16, expect=HEADS)
    assert summary(kv) == (4, 10, 8192)
    assert "4 planes on cpu, 10 blocks" in kv.describe()


def test_payload_bytes() -> None:
    kv = PagedKV([cache(10, 16, 64), cache(10, 16, 1, dtype=torch.float32)], block_size=16)
    assert kv.block_bytes == 2048 + 64
    assert kv.payload_bytes(8) == 8 * (2048 + 64)
