"""Bad tokens, salts, masks and pins: each is a ``ValueError`` that names the argument and what is wrong with it."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from vcache.arguments import DEFAULT_PIN_S, masked_prefix, pin_seconds
from vcache.keys import chunk_keys, tenant_of
from vcache.tokens import FEW

BAD_TOKENS = [
    ([], "empty"),
    (np.array([], np.int32), "empty"),
    (torch.tensor([], dtype=torch.int64), "empty"),
    ([[1, 2], [3, 4]], "one-dimensional"),
    ([1, [2]], "one-dimensional"),
    ([torch.tensor([1, 2])], "one-dimensional"),
    ([np.array([1, 2])], "one-dimensional"),
    (np.zeros((2, 4), np.int32), r"one-dimensional, got shape \(2, 4\)"),
    (torch.zeros(1, 8, dtype=torch.int64), r"one-dimensional, got shape \(1, 8\)"),
    (np.int64(3), "int64"),
    (torch.tensor(3), "one-dimensional"),
    ([1.0, 2.0], "integers, found float"),
    ([1, 2.5], "integers, found float"),
    (np.zeros(8, np.float32), "integers, got float32"),
    (torch.zeros(8, dtype=torch.bfloat16), "integers, got torch.bfloat16"),
    ([True, False], "found bool"),
    (np.ones(8, bool), "integers, got bool"),
    (torch.ones(8, dtype=torch.bool), "integers, got torch.bool"),
    (np.array([1, None], dtype=object), "integers, got object"),
    ([1, -1], "negative, found -1"),
    (np.array([1, -5], np.int16), "negative, found -5"),
    (torch.tensor([-1]), "negative, found -1"),
    (array("b", [-2]), "negative, found -2"),
    ([2**31], "int32 .*found 2147483648"),
    ([2**32], "int32 .*found 4294967296"),
    ([2**70, 1], "int32"),
    (np.array([2**31], np.int64), "int32"),
    (torch.tensor([2**40]), "int32"),
    ("1234", "got str"),
    (b"1234", "got bytes"),
    (bytearray(8), "got bytearray"),
    (memoryview(b"12345678"), "got memoryview"),
    (["1", "2"], "found str"),
    ([None], "found NoneType"),
    (7, "got int"),
    (None, "got NoneType"),
    ({1, 2}, "got set"),
    (torch.zeros(4, dtype=torch.int64, device="meta"), "meta"),
    (torch.tensor([1, 0, 2]).to_sparse(), "sparse"),
]


@pytest.mark.parametrize(("tokens", "said"), BAD_TOKENS)
def test_bad_tokens_are_refused_by_name(tokens, said):
    with pytest.raises(ValueError, match=f"^tokens .*{said}"):
        chunk_keys(tokens, chunk_size=4, fingerprint=b"f")


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
@pytest.mark.parametrize(("wrong", "said"), [(-1, "negative, found -1"), (2**31, "int32 .*found 2147483648")])
def test_one_bad_token_among_many_is_refused(make, wrong, said):
    with pytest.raises(ValueError, match=f"^tokens .*{said}"):
        chunk_keys(make([1] * FEW + [wrong]), chunk_size=4, fingerprint=b"f")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"salt": 5}, "salt must be a str"),
        ({"salt": None}, "salt must be a str"),
        ({"salt": "\ud800"}, "salt has no UTF-8"),
        ({"extra_keys": "lora"}, "extra_keys must be a sequence"),
        ({"extra_keys": 5}, "extra_keys must be a sequence"),
        ({"extra_keys": (5,)}, "extra_keys must hold str or bytes only, found int"),
        ({"extra_keys": ("\ud800",)}, "extra_keys has no UTF-8"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_a_bad_salt_or_extra_key_is_refused_by_name(named, said):
    with pytest.raises(ValueError, match=said):
        chunk_keys([1, 2, 3, 4], **{"chunk_size": 4, "fingerprint": b"f", **named})


def test_a_bad_salt_has_no_tenant():
    with pytest.raises(ValueError, match="salt"):
        tenant_of(7)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(7, dtype=torch.bool), r"8 tokens, got shape \(7,\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"got shape \(2, 4\)"),
        (torch.ones(8, dtype=torch.int64), "bool, got torch.int64"),
        (np.ones(8), "bool, got float64"),
        ([1] * 8, "bool, got int64"),
        (torch.ones(8, dtype=torch.bool, device="meta"), "host memory"),
        ([True] * 4 + [False] * 4, "false again after token 0"),
        ([False] * 4 + [True, False, True, True], "false again after token 4"),
        ([False] * 3 + [True] * 5, "multiple of 4 tokens"),
        ([[True], [True, False]], "one-dimensional"),
        ("mask", "got shape"),
    ],
)
def test_bad_masks_are_refused_by_name(mask, said):
    with pytest.raises(ValueError, match=f"^mask .*{said}"):
        masked_prefix(mask, tokens=8, chunk_size=4)


@pytest.mark.parametrize("skipped", [0, 4, 8])
def test_a_mask_leaves_out_its_leading_false_run(skipped):
    mask = [False] * skipped + [True] * (8 - skipped)
    for form in (mask, np.array(mask), torch.tensor(mask)):
        assert masked_prefix(form, tokens=8, chunk_size=4) == skipped
    assert masked_prefix(None, tokens=8, chunk_size=4) == 0


def test_pins_are_seconds_within_what_the_wire_carries():
    assert pin_seconds(0) == 0
    assert pin_seconds(False) == 0
    assert pin_seconds(2.5) == 2.5
    assert pin_seconds(np.int64(3)) == 3
    assert pin_seconds(np.float32(0.5)) == 0.5
    assert pin_seconds(True) == DEFAULT_PIN_S
    for bad in (-1, float("nan"), float("inf"), 86_401, "5", None):
        with pytest.raises(ValueError, match=r"^pin must be seconds"):
            pin_seconds(bad)
