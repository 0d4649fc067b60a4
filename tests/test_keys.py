"""Chunk keys: golden vectors, independence of process and container, and what makes two keys differ."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcache.errors import ConfigError
from vcache.keys import KeyChain, ModelSpec, chunk_keys, format_key, parse_key, tenant_of
from vcache.tokens import FEW

SPEC = ModelSpec(model="llama", dtype="bfloat16", num_layers=2, num_kv_heads=2, head_size=8, block_size=4, chunk_size=8)


def plain_keys(tokens, chunk_size, fingerprint, salt, extra_keys):
    """The definition, written as plainly as it reads: each key hashes everything before it anew."""

    def field(data):
        return len(data).to_bytes(8, "little") + data

    head = field(b"vcache/chunk-key/1") + field(fingerprint) + field(salt.encode())
    head += len(extra_keys).to_bytes(8, "little")
    for extra in extra_keys:
        head += field(b"b" + extra if isinstance(extra, bytes) else b"s" + extra.encode())
    keys = []
    for end in range(chunk_size, len(tokens) + 1, chunk_size):
        body = b"".join(token.to_bytes(4, "little") for token in tokens[:end])
        keys.append(hashlib.sha256(head + body).digest()[:16])
    return keys


def plain_fingerprint(**named):
    def field(data):
        return len(data).to_bytes(8, "little") + data

    extra = named.pop("extra")
    data = field(b"vcache/model/1")
    for name in sorted(named):
        data += field(name.encode()) + field(str(named[name]).encode())
    data += field(b"extra") + len(extra).to_bytes(8, "little")
    for name, value in sorted(extra):
        data += field(name.encode()) + field(value.encode())
    return hashlib.sha256(data).digest()


def keys(tokens, salt="", extra_keys=(), spec=SPEC):
    return chunk_keys(
        tokens, chunk_size=spec.chunk_size, fingerprint=spec.fingerprint(), salt=salt, extra_keys=extra_keys
    )


GOLDEN = [
    # chunk_size, fingerprint, salt, extra keys, tokens, keys
    (
        4,
        bytes(32),
        "",
        (),
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        ("vc1-57db2cd2c3bbbd8f32e85cb63c3fdfe5", "vc1-16610bb81049d6d2d179d1efa48bf0fb"),
    ),
    (
        2,
        bytes(range(32)),
        "tenant-ä",
        ("lora-7", b"\x00image"),
        [0, 2**31 - 1],
        ("vc1-04e1255d8ab11aeb4f1545b8aedc43fd",),
    ),
    (
        256,
        b"\xff" * 32,
        "",
        ("",),
        list(range(512)),
        ("vc1-9389c819e1171d83c7a15b3ad4852402", "vc1-5fdb9440fc4af032e86db83a927cecee"),
    ),
]


@pytest.mark.parametrize(("chunk_size", "fingerprint", "salt", "extra_keys", "tokens", "expected"), GOLDEN)
def test_golden_vectors_hold_in_both_implementations(chunk_size, fingerprint, salt, extra_keys, tokens, expected):
    made = chunk_keys(tokens, chunk_size=chunk_size, fingerprint=fingerprint, salt=salt, extra_keys=extra_keys)
    assert made == plain_keys(tokens, chunk_size, fingerprint, salt, extra_keys)
    assert tuple(format_key(key) for key in made) == expected


def test_the_fingerprint_is_pinned():
    spec = ModelSpec(
        model="meta/llama", revision="abc", dtype="bfloat16", kv_cache_dtype="fp8", num_layers=32, num_kv_heads=8,
        head_size=128, block_size=16, chunk_size=256, kv_layout="HND", tensor_parallel_size=2,
        pipeline_parallel_size=1, extra=(("scales", "0.5"), ("rope", "yarn")),
    )  # fmt: skip
    plain = plain_fingerprint(
        model="meta/llama", revision="abc", dtype="bfloat16", kv_cache_dtype="fp8", num_layers=32, num_kv_heads=8,
        head_size=128, block_size=16, chunk_size=256, kv_layout="HND", tensor_parallel_size=2,
        pipeline_parallel_size=1, extra=(("scales", "0.5"), ("rope", "yarn")),
    )  # fmt: skip
    assert spec.fingerprint() == plain
    assert spec.fingerprint().hex() == "739bd67038f970409395f9b3fe9acdbe4b8dd92e2c6432d3c3d7cdd796676a40"


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
    st.integers(1, 9),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.lists(st.one_of(st.binary(max_size=4), st.text("ab\x00", max_size=3)), max_size=3),
)
def test_keys_equal_the_plain_definition_for_any_input(tokens, chunk_size, salt, extra_keys):
    made = chunk_keys(tokens, chunk_size=chunk_size, fingerprint=b"f", salt=salt, extra_keys=extra_keys)
    assert made == plain_keys(tokens, chunk_size, b"f", salt, extra_keys)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60), st.data())
def test_a_chain_gives_the_same_keys_however_the_prompt_arrives(tokens, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=4)) | {len(tokens)})
    chain, made, start = KeyChain(chunk_size=4, fingerprint=b"f"), [], 0
    for cut in cuts:
        made, start = made + chain.extend(tokens[start:cut]), cut
    assert made == chunk_keys(tokens, chunk_size=4, fingerprint=b"f")


@pytest.mark.parametrize("times", [5, FEW])
def test_list_tuple_array_numpy_and_torch_give_the_same_keys(times):
    tokens = [3, 0, 2**31 - 1, 128_255] * times
    expected = keys(tokens)
    forms = [tuple(tokens), array("i", tokens), array("q", tokens), [np.int64(t) for t in tokens]]
    forms += [np.array(tokens, dtype) for dtype in ("<i4", "<u4", "<i8", "<u8", ">i4", ">i8")]
    forms += [torch.tensor(tokens, dtype=dtype) for dtype in (torch.int32, torch.int64)]
    forms += [np.repeat(tokens, 2)[::2], torch.tensor(tokens).repeat_interleave(2)[::2]]
    for form in forms:
        assert keys(form) == expected, type(form)


def test_keys_do_not_depend_on_process_or_hash_seed():
    program = (
        "from vcache.keys import ModelSpec, chunk_keys, tenant_of\n"
        f"spec = {SPEC!r}\n"
        "keys = chunk_keys(list(range(64)), chunk_size=8, fingerprint=spec.fingerprint(), salt='s', extra_keys=('x', b'y'))\n"
        "print(b''.join(keys).hex(), tenant_of('s'))\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    here = b"".join(keys(list(range(64)), salt="s", extra_keys=("x", b"y"))).hex()
    assert said == {f"{here} {tenant_of('s')}\n"}


def test_a_key_names_all_tokens_before_it():
    first, second = keys([1] * 16), keys([2] + [1] * 15)
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert keys([1] * 16 + [7] * 8)[:2] == first


def test_tokens_beyond_the_last_full_chunk_have_no_key():
    assert keys([1] * 7) == []
    assert len(keys([1] * 15)) == 1


def test_fields_never_run_together():
    base = [5] * 8
    seen = [keys(base, salt=s, extra_keys=e)[0] for s, e in [
        ("", ()), ("a", ()), ("", ("a",)), ("", (b"a",)), ("ab", ()), ("a", ("b",)), ("", ("a", "b")), ("", ("ab",)),
        ("", ("",)), ("", ("", "")), ("\x00", ()),
    ]]  # fmt: skip
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"), ("revision", "r2"), ("dtype", "float16"), ("kv_cache_dtype", "fp8_e4m3"), ("num_layers", 3),
        ("num_kv_heads", 4), ("head_size", 16), ("block_size", 2), ("chunk_size", 16), ("kv_layout", "HND"),
        ("tensor_parallel_size", 2), ("pipeline_parallel_size", 2), ("extra", (("scales", "x"),)),
    ],
)  # fmt: skip
def test_every_field_of_the_model_enters_the_fingerprint(field, value):
    named = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    assert ModelSpec(**{**named, field: value}).fingerprint() != SPEC.fingerprint()


def test_parallel_sizes_are_not_interchangeable_and_extra_has_no_order():
    named = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    tensor = ModelSpec(**{**named, "tensor_parallel_size": 2})
    pipeline = ModelSpec(**{**named, "pipeline_parallel_size": 2})
    assert tensor.ranks == pipeline.ranks == 2
    assert tensor.fingerprint() != pipeline.fingerprint()
    one = ModelSpec(**{**named, "extra": (("a", "1"), ("b", "2"))})
    other = ModelSpec(**{**named, "extra": (("b", "2"), ("a", "1"))})
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "", "non-empty string"),
        ("model", "\ud800", "UTF-8"),
        ("revision", None, "string"),
        ("num_layers", 0, "from 1"),
        ("num_kv_heads", 2.0, "from 1"),
        ("head_size", True, "from 1"),
        ("chunk_size", 9, "8 would work"),
        ("tensor_parallel_size", 4097, "from 1 to 4096"),
        ("extra", {"a": "b"}, "pairs"),
        ("extra", (("a", 1),), "string"),
        ("extra", (("a", "1"), ("a", "2")), "twice"),
    ],
)
def test_an_impossible_model_is_refused_by_field(field, value, said):
    named = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    with pytest.raises(ConfigError, match=f"(?s)model\\.{field}.*{said}"):
        ModelSpec(**{**named, field: value})


def test_text_form_round_trips():
    key = keys([1] * 8)[0]
    assert parse_key(format_key(key)) == key
    assert format_key(key).startswith("vc1-")
    assert len(format_key(key)) == 36


@pytest.mark.parametrize("text", ["", "vc1-", "vc1-" + "0" * 31, "vc1-" + "0" * 33, "vc2-" + "0" * 32, "vc1-" + "G" * 32,
                                  "VC1-" + "0" * 32, "vc1-" + "A" * 32, "vc1-" + "0" * 32 + "\n", 5, None])  # fmt: skip
def test_a_malformed_text_form_is_refused(text):
    with pytest.raises(ValueError, match=r"key .* is not of the form"):
        parse_key(text)


def test_a_key_of_the_wrong_size_has_no_text_form():
    with pytest.raises(ValueError, match="key must be 16 bytes, got 3"):
        format_key(b"abc")


def test_tenants_are_63_bits_and_zero_without_salt():
    assert tenant_of("") == 0
    assert 0 < tenant_of("a") < 1 << 63
    assert tenant_of("a") != tenant_of("b")
